"""Files as a stranger might send them: a quantized checkpoint in which something was
changed.

Each entry makes one file. What ends in a refusal is in REFUSED, HARMLESS is read all
the same; nothing of either may run: what would run leaves a mark.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict

import safetensors
import safetensors.torch
import torch

MARK = 'evil_was_here'
COMMAND = f'touch {MARK}'
ESCAPE = '\x1b[2J\x1b[31mred\u202e'

QKV = 'backbone.stages.0.blocks.0.attn.w_msa.qkv'
QK = 'backbone.stages.0.blocks.0.attn.w_msa.qk'
PV = 'backbone.stages.0.blocks.0.attn.w_msa.pv'
LAST = 'backbone.stages.3.blocks.0.attn.w_msa'
FC2 = 'backbone.stages.0.blocks.0.ffn.layers.1'
INDEX = 'backbone.stages.0.blocks.0.attn.w_msa.relative_position_index'
NORM = 'backbone.norm0.weight'


class Calls:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Builds:
    """Pickles as an object whose state is set by another one."""

    def __init__(self, function, arguments, state):
        self.reduced = function, arguments, state

    def __reduce__(self):
        return self.reduced


def _history(name):
    from mmengine.logging import HistoryBuffer

    return Calls(getattr, HistoryBuffer, name)


def _legacy(content):
    """A file as torch before 1.6 wrote it, its pickle by Python's own pickler."""
    file = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True), content, []):
        pickle.dump(part, file, protocol=2)
    return file.getvalue()


def _tar(content):
    """A file as torch before 0.1.10 wrote it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            data = pickle.dumps(content)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _pickled(operations):
    """A checkpoint whose pickle is a dict of weights made by raw operations."""

    def make(whole, _):
        pickled = b'\x80\x02}X\x0a\x00\x00\x00state_dict}' + operations + b's' + b's.'
        return _zip(lambda archive, entries: entries.update({_data(entries): pickled}))(
            whole, _
        )

    return make


def _data(entries):
    return next(name for name in entries if name.endswith('/data.pkl'))


def _polyglot(content):
    """A tar archive that begins as a file of old torch does."""
    data, file = pickle.dumps(content, 2), io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        info = tarfile.TarInfo('storages')
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    whole = bytearray(file.getvalue())
    whole[: len(LEGACY)] = LEGACY
    whole[148:156] = b'        '
    whole[148:156] = b'%06o\0 ' % sum(whole[:512])
    return bytes(whole)


LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


def _shared(count):
    """A tree of 2^count leaves in a few bytes."""
    tree = [1]
    for _ in range(count):
        tree = [tree, tree]
    return tree


def _views(content):
    storage = torch.zeros(2**16)
    return saved(
        {**content, 'state_dict': {f'x{number}': storage[:] for number in range(300)}}
    )


def _zip(change):
    """The archive of a checkpoint, its entries changed: a function of their names and
    contents.
    """

    def make(whole, _):
        file, entries = io.BytesIO(), {}
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, 'w') as archive:
            change(archive, entries)
            for name, data in entries.items():
                archive.writestr(name, data)
        return file.getvalue()

    return make


def _bomb(archive, entries):
    name = next(name for name in entries if name.endswith('/data.pkl'))
    entries.pop(name)
    archive.writestr(zipfile.ZipInfo(name), bytes(2**26), zipfile.ZIP_DEFLATED)


def _inflated(archive, entries):
    for name in [name for name in entries if '/data/' in name]:
        archive.writestr(
            zipfile.ZipInfo(name),
            bytes(40 * len(entries.pop(name))),
            zipfile.ZIP_DEFLATED,
        )


def _second_pickle(archive, entries):
    entries['other/data.pkl'] = pickle.dumps(Calls(os.system, COMMAND), protocol=2)


def _claims(storage, shape, stride):
    """A tensor that claims more values than its storage holds, as its pickle would say
    it.
    """
    return Calls(
        torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, OrderedDict()
    )


def _endless():
    tree = []
    tree.append(tree)
    return tree


def _laughs():
    tree = ['ha']
    for _ in range(60):
        tree = [tree, tree]
    return tree


def at(*path):
    """A function that sets the value at a path of keys, or removes it if there is none."""

    def set_(tree, value=None, remove=False):
        for key in path[:-1]:
            tree = tree[key]
        if remove:
            del tree[path[-1]]
        else:
            tree[path[-1]] = value

    return set_


def says(path, value):
    """A change of what the file says of itself."""
    return lambda state, made: at(*path)(made, value)


def lacks(path):
    return lambda state, made: at(*path)(made, remove=True)


def holds(key, change):
    """A change of a tensor."""
    return lambda state, made: state.update({key: change(state[key])})


def both(*changes):
    return lambda state, made: [change(state, made) for change in changes]


# What goes into .pth alone: the bytes from the content, or from the bytes of the honest
# file.
BYTES = {
    'a call beside the weights': lambda _, c: saved(
        {**c, 'extra': Calls(os.system, COMMAND)}
    ),
    'a call as what it says of itself': lambda _, c: saved(
        {**c, 'meta': {'mmptq': Calls(os.system, COMMAND)}}
    ),
    'a call as a weight': lambda _, c: saved(
        {**c, 'state_dict': {**c['state_dict'], 'x': Calls(os.system, COMMAND)}}
    ),
    'a call as the whole': lambda _, c: saved(Calls(os.system, COMMAND)),
    'eval': lambda _, c: saved(
        {**c, 'extra': Calls(eval, f'__import__("os").system("{COMMAND}")')}
    ),
    'exec': lambda _, c: saved(
        {**c, 'extra': Calls(exec, f'import os; os.system("{COMMAND}")')}
    ),
    'an array of calls': lambda _, c: saved({**c, 'extra': _calls()}),
    'torch.load': lambda _, c: saved({**c, 'extra': Calls(torch.load, 'other.pth')}),
    'a file of old torch with a call': lambda _, c: _legacy(Calls(os.system, COMMAND)),
    'a file of the oldest torch': lambda _, c: _tar(Calls(os.system, COMMAND)),
    'a plain pickle': lambda _, c: pickle.dumps(Calls(os.system, COMMAND)),
    'a pickle of protocol 4': lambda _, c: saved(
        {**c, 'extra': Calls(os.system, COMMAND)}, protocol=4
    ),
    'nothing': lambda _, c: b'',
    'half of it': lambda whole, _: whole[: len(whole) // 2],
    'noise': lambda whole, _: bytes(range(256)) * 10,
    'an empty archive': lambda *_: b'PK\x05\x06' + bytes(18),
    'a bomb as pickle': _zip(_bomb),
    'weights that inflate': _zip(_inflated),
    'a second pickle': _zip(_second_pickle),
    'no dict': lambda _, c: saved([1, 2]),
    'no weights': lambda _, c: saved({**c, 'state_dict': [1]}),
    'a weight without values': lambda _, c: _with(
        c, torch.zeros(1).expand(20000, 20000)
    ),
    'a weight beyond its values': lambda _, c: _with(
        c, _claims(torch.zeros(1)._typed_storage(), (20000, 20000), (20000, 1))
    ),
    'a sparse weight': lambda _, c: _with(c, torch.eye(3).to_sparse()),
    'a complex weight': lambda _, c: _with(c, torch.zeros(3, dtype=torch.complex64)),
    'a quantized weight': lambda _, c: _with(
        c, torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    ),
    'a weight that is a text': lambda _, c: _with(c, 'text'),
    'a name that clears the screen': lambda _, c: _with(c, torch.zeros(1), ESCAPE),
    'a name that is a number': lambda _, c: _with(c, torch.zeros(1), 7),
    'what it says holds itself': lambda _, c: saved(
        {**c, 'meta': {'mmptq': _endless()}}
    ),
    'what it says is endless': lambda _, c: saved({**c, 'meta': {'mmptq': _laughs()}}),
    'what it says is a list': lambda _, c: saved({**c, 'meta': {'mmptq': [1]}}),
    'what it says is nothing': lambda _, c: saved({**c, 'meta': {}}),
    'a key of many tuples': _pickled(b')' + b'\x85' * 300_000 + b'K\x01'),
    'a key of shared tuples': _pickled(
        b')q\x00' + b'h\x00h\x00\x86q\x00' * 60 + b'K\x01'
    ),
    'a storage that is called': _pickled(
        b'ctorch.storage\nUntypedStorage\n(J\x00\xa3\xe1\x11tRK\x01'
    ),
    'a set of tuples': lambda _, c: saved({**c, 'extra': {(1, 2), (3, 4)}}),
    'an archive of old torch in disguise': lambda _, c: _polyglot(
        Calls(os.system, COMMAND)
    ),
    'a program of TorchScript': _zip(
        lambda archive, entries: entries.update(
            {_data(entries).replace('data.pkl', 'constants.pkl'): b''}
        )
    ),
    'a long text many times': lambda _, c: saved(
        _said(c, ('recipe', 'name'), ['a' * 9000] * 9000)
    ),
    'a layer many times': lambda _, c: saved(
        _said(c, ('layers',), [c['meta']['mmptq']['layers'][0]] * 40_000)
    ),
    'a class as type': lambda _, c: saved(
        _said(c, ('recipe', 'method', 'type'), OrderedDict)
    ),
    'a function as type': lambda _, c: saved(
        _said(
            c,
            ('recipe', 'quantizers', 'query', 'type'),
            torch._utils._rebuild_tensor_v2,
        )
    ),
}

# What both kinds of files can hold: changes of the tensors and of what the file says of
# itself.
CONTENT = {
    'a command as method': says(
        ('recipe', 'method'), dict(type='os.system', command=COMMAND)
    ),
    'exec as method': both(
        says(('recipe', 'method'), dict(type='builtins.exec')),
        says(('method',), 'builtins.exec'),
    ),
    'a command as quantizer': says(
        ('recipe', 'quantizers', 'query'),
        dict(type='subprocess.check_output', args=COMMAND),
    ),
    'a program as recipe': says(('recipe',), 'evil.py'),
    'a pattern of stars': says(('recipe', 'layers'), {'*a' * 50: dict(float=True)}),
    'patterns beyond number': says(
        ('recipe', 'layers'), [dict(pattern=f'{n}*', float=False) for n in range(5000)]
    ),
    'a program as method': says(('recipe', 'method', 'type'), 'evil'),
    'a type without name': says(('recipe', 'method', 'type'), ''),
    'a type of a dot': says(('recipe', 'quantizers', 'key', 'type'), '.a'),
    'a type that is a list': says(
        ('recipe', 'quantizers', 'key', 'type'), ['UniformQuantizer']
    ),
    'a type of another registry': says(('recipe', 'method', 'type'), 'mmdet.MaskRCNN'),
    'a hidden option': says(('recipe', 'method', '__init__'), 1),
    'a recipe named to clear the screen': says(('recipe', 'name'), ESCAPE),
    'a recipe named as a path': says(('recipe', 'name'), '../../etc'),
    'bits as text': says(('recipe', 'bits', 'weight'), '4'),
    'far too many bits': says(('recipe', 'bits', 'activation'), 10**9),
    'bits that are not those of the recipe': says(('bits', 'activation'), 8),
    'a method that is not that of the recipe': says(('method',), 'UQViT'),
    'an unknown scope': says(('scope',), 'everything'),
    'a scope that is a list': says(('scope',), ['backbone']),
    'images as text': says(('calibration', 'images'), 'many'),
    'fewer images than none': says(('calibration', 'images'), -1),
    'a leak that is a text': says(('calibration', 'leak'), 'no'),
    'a data set that clears the screen': says(('calibration', 'dataset'), ESCAPE),
    'seconds as a list': says(('calibration', 'seconds'), [1.0]),
    'no calibration': lacks(('calibration',)),
    'layers that are none': says(('layers',), 5),
    'a layer that is a text': says(('layers',), ['qkv']),
    'a layer without reason': lacks(('layers', 0, 'reason')),
    'a layer whose bits are text': says(('layers', 0, 'bits'), 'four'),
    'a reason that is a number': says(('layers', 0, 'reason'), 3),
    'a metric that is a text': says(
        ('float',), dict(metrics=dict(mIoU='good'), seconds=1.0)
    ),
    'a metric that clears the screen': says(
        ('float',), dict(metrics={ESCAPE: 1.0}, seconds=1.0)
    ),
    'a size as text': says(('size', 'float_mib'), 'small'),
    'a surplus key': says(('colour',), 'red'),
    'a scale below zero': holds(f'{QKV}.input_quantizer.scale', torch.neg),
    'a scale that is zero': holds(f'{QKV}.weight_quantizer.scale', torch.zeros_like),
    'a scale that is not a number': holds(
        f'{QKV}.input_quantizer.scale', lambda x: x * torch.nan
    ),
    'a scale of whole numbers': holds(
        f'{QKV}.input_quantizer.scale', lambda x: x.ceil().int()
    ),
    'a scale with too many axes': holds(
        f'{QKV}.input_quantizer.scale', lambda x: x[None]
    ),
    'fewer scales than channels': holds(
        f'{QKV}.weight_quantizer.scale', lambda x: x[:1]
    ),
    'more scales than heads': holds(
        f'{QK}.left_quantizer.scale', lambda x: torch.cat([x, x])
    ),
    'a zero point that is no code': holds(
        f'{QKV}.input_quantizer.zero_point', lambda x: x + 16
    ),
    'a zero point below zero': holds(
        f'{QKV}.input_quantizer.zero_point', lambda x: x - 99
    ),
    'a zero point with a fraction': holds(
        f'{QKV}.input_quantizer.zero_point', lambda x: x + 0.5
    ),
    'a base of zero': holds(f'{FC2}.input_quantizer.q', torch.zeros_like),
    'a huge base': holds(f'{FC2}.input_quantizer.q', lambda x: x * 1e9),
    'a base that is none': holds(f'{PV}.left_quantizer.q', lambda x: x * torch.inf),
    'a rescale below zero': holds(f'{QKV}.rescale.scale', torch.neg),
    'a scale for all heads': holds(f'{LAST}.qk.left_quantizer.scale', lambda x: x[:1]),
    'a rescale of another length': holds(f'{QKV}.rescale.shift', lambda x: x[:-1]),
    'a shift of GELU for each channel': holds(
        f'{FC2}.rescale.shift', lambda x: x.expand(3).clone()
    ),
    'no zero point': lambda state, made: state.pop(f'{QK}.left_quantizer.zero_point'),
    'a weight that is not a number': holds(NORM, lambda x: x * torch.nan),
    'a weight of another shape': holds(NORM, lambda x: x[:-1]),
    'a place outside of the table': holds(INDEX, lambda x: x + 10**6),
    'a weight beyond float32': holds(
        NORM, lambda x: torch.full_like(x, 1e300, dtype=torch.float64)
    ),
    'a weight of truth values': holds(NORM, torch.Tensor.bool),
    'a weight with an imaginary part': holds(NORM, lambda x: x.to(torch.complex64)),
    'a weight of eight bits': holds(NORM, lambda x: x.to(torch.float8_e4m3fn)),
    'a quantizer that the model lacks': lambda state, made: state.update(
        {'backbone.evil_quantizer.scale': torch.ones(())}
    ),
}

HARMLESS = {
    'a method of a history': lambda _, c: saved({**c, 'extra': _history('__init__')}),
    'what a method of a history knows': lambda _, c: saved(
        {**c, 'extra': Calls(getattr, _history('mean'), '__globals__')}
    ),
    'an array of numpy': lambda _, c: saved({**c, 'extra': _array()}),
    'classes that are an array': lambda _, c: saved(
        {**c, 'meta': {**c['meta'], 'dataset_meta': {'classes': _array()}}}
    ),
    'a program as config': lambda _, c: saved(
        {
            **c,
            'meta': {
                **c['meta'],
                'config': f'import os; os.system("{COMMAND}")',
                'epoch': 0,
                'iter': 0,
            },
        }
    ),
    'a config of mmengine beside the weights': lambda _, c: saved(
        {**c, 'extra': _config_dict()}
    ),
    'classes that are a tree without end': lambda _, c: saved(
        {
            **c,
            'meta': {
                **c['meta'],
                'dataset_meta': {f'k{n}': _shared(19) for n in range(50)},
            },
        }
    ),
    'classes that are a number': lambda _, c: saved(
        {**c, 'meta': {**c['meta'], 'CLASSES': 7}}
    ),
    'a dict that hides its items': lambda _, c: saved(
        {**c, 'extra': Builds(OrderedDict, (), {'items': 5, 'get': OrderedDict})}
    ),
}
"""Read without the part that would do harm."""

# What a packed file says of its model.
MODELS = {
    'a command as head': (
        lambda m: m['decode_head'].update(type='os.system', command=COMMAND)
    ),
    'a command as model': lambda m: m.update(
        type='subprocess.check_output', args=['touch', MARK]
    ),
    'a loss that loads a file': (
        lambda m: m['decode_head']['loss_decode'].update(class_weight='evil.pkl')
    ),
    'a loss that unpickles a file': (
        lambda m: m['decode_head']['loss_decode'].update(class_weight='pkl')
    ),
    'a padding that is a module': lambda m: m.update(
        neck=dict(
            type='ConvModule',
            in_channels=8,
            out_channels=8,
            kernel_size=1,
            padding_mode='evil',
        )
    ),
    'a convolution that is a module': (
        lambda m: m['decode_head'].update(conv_cfg=dict(type='Conv2d', layout='evil'))
    ),
    'windows that take the memory': lambda m: m['backbone'].update(window_size=300),
    'a layer many times': lambda m: m['decode_head'].update(num_convs=50_000),
    'a module as norm': lambda m: m['decode_head'].update(norm_cfg=dict(type='evil')),
    'a program as recipe of a nested backbone': lambda m: m.update(
        backbone=dict(
            type='mmptq.QuantBackbone', backbone=m['backbone'], recipe='evil.py'
        )
    ),
    'a teacher': lambda m: m.update(
        type='mmdet.KnowledgeDistillationSingleStageDetector', teacher_ckpt='evil.pth'
    ),
    'a pretrained file': lambda m: m['backbone'].update(pretrained='evil.pth'),
    'an address': lambda m: m['backbone'].update(style='http://127.0.0.1:9/evil.pth'),
    'a checkpoint of timm': lambda m: m.update(
        backbone=dict(
            type='mmptq.TimmBackbone',
            model_name='vit_tiny_patch16_224',
            checkpoint_path='evil.pth',
        )
    ),
    'a hub of timm': lambda m: m.update(
        backbone=dict(
            type='mmptq.TimmBackbone', model_name='hf-hub:evil/evil', out_indices=[0]
        )
    ),
    'a huge backbone': lambda m: m['backbone'].update(embed_dims=96 * 2000),
    'an endless backbone': lambda m: m['backbone'].update(depths=[2, 2, 10**6, 2]),
    'an endless number': lambda m: m['backbone'].update(depths=[2, 2, 10**12, 2]),
    'a name of an operation that is evaluated': lambda m: m.update(
        test_cfg=dict(nms=dict(type=f'__import__("os").system("{COMMAND}")'))
    ),
    'another scope': lambda m: m['backbone'].update(_scope_='evil'),
    'a text as model': lambda m: m.update(backbone='mmseg.SwinTransformer'),
}


def _calls():
    import numpy as np

    return np.array([Calls(os.system, COMMAND)], dtype=object)


def _array():
    import numpy as np

    return np.array([1.5, 2.5])


def _config_dict():
    from mmengine.config import ConfigDict

    return ConfigDict(a=dict(b=1), c=[1])


def _said(content, path, value):
    copy = pickle.loads(pickle.dumps({'meta': content['meta']}))
    at('meta', 'mmptq', *path)(copy, value)
    return {**content, **copy}


def _with(content, value, name='backbone.surplus'):
    return saved({**content, 'state_dict': {**content['state_dict'], name: value}})


def saved(content, protocol=2):
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol)
    return file.getvalue()


def changed_pth(honest, change):
    """The bytes of a quantized.pth with changed content."""
    content = torch.load(honest, weights_only=True)
    made = content['meta']['mmptq']
    content['meta']['mmptq'] = json.loads(json.dumps(made))  # no part is in it twice
    change(content['state_dict'], content['meta']['mmptq'])
    return saved(content)


def changed_packed(honest, change=None, model=None):
    """The bytes of a quantized.safetensors with changed content, or another model."""
    with safetensors.safe_open(honest, 'pt') as file:
        about = json.loads(file.metadata()['mmptq-packed'])
    tensors = safetensors.torch.load_file(honest)
    if change:
        change(tensors, about['mmptq'])
    if model:
        model(about['model'])
    return safetensors.torch.save(tensors, {'mmptq-packed': json.dumps(about)})


def packed_bytes(honest):
    """Damaged safetensors files."""
    whole = honest.read_bytes()
    size = struct.unpack('<Q', whole[:8])[0]
    return {
        'half of it': whole[: len(whole) // 2],
        'a header that is longer than the file': struct.pack('<Q', 2**40) + whole[8:],
        'a header that is no JSON': whole[:8] + b'{' * size + whole[8 + size :],
        'nothing': b'',
        'a checkpoint of torch.save': saved({'state_dict': {}}),
    }
