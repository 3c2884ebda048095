"""The packed file: what it holds, that it rebuilds the model, what is refused, and that
nothing in it runs.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from mmptq import QuantizationError, __version__
from mmptq.apis import load_packed, load_recipe
from mmptq.backbones import find_spec
from mmptq.calibration import Call, calibrate, operations
from mmptq.checkpoints.packed import _from_json, packed_model, read_packed, write_packed
from mmptq.checkpoints.trusted import trusted_model
from mmptq.wrapping.configs import quantized_config

from ..conftest import SWIN, about, build_in, fast, image, mixed, randomized
from ..test_all_models import DETECTORS, SEGMENTORS, config_of

ROOT = Path(__file__).parents[2]
OWN = [
    f'configs/{folder}/{name}'
    for folder, name in (
        ('demo', 'mask-rcnn_swin-demo.py'),
        ('demo', 'upernet_swin-demo.py'),
    )
]
MODEL = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=dict(SWIN, type='mmseg.SwinTransformer'),
    decode_head=dict(
        type='FCNHead',
        in_channels=16,
        channels=8,
        in_index=1,
        num_convs=1,
        num_classes=3,
        norm_cfg=dict(type='BN', requires_grad=True),
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """A small segmentor, calibrated, and its packed file."""
    torch.manual_seed(0)
    recipe = fast('adalog_w4a4')
    cfg = quantized_config(
        Config(dict(model=MODEL, default_scope='mmseg')), recipe, 'backbone'
    )
    model = randomized(build_in('mmseg', cfg.model))
    backbone = model.backbone
    calibrate(
        backbone,
        find_spec(backbone).block_names(backbone),
        [Call((image(64, 64),))],
        backbone.quantization.recipe.build_method(),
    )
    path = tmp_path_factory.mktemp('packed') / 'a.safetensors'
    write_packed(
        model,
        cfg,
        about(recipe),
        dict(classes=('a', 'b', 'c'), palette=[[0, 0, 0]]),
        path,
    )
    return model, path, cfg


def content_of(path):
    """The metadata of a packed file."""
    with safetensors.safe_open(path, 'pt') as file:
        metadata = file.metadata()
    assert set(metadata) == {'mmptq-packed'}
    return json.loads(metadata['mmptq-packed'])


def rewritten(source, target, tensors=None, content=None):
    """A packed file whose tensors, or whose metadata, a function changed or replaced by
    a text.
    """
    found, metadata = safetensors.torch.load_file(source), content_of(source)
    if tensors:
        tensors(found)
    text = content and content(metadata)
    safetensors.torch.save_file(
        found,
        target,
        {'mmptq-packed': text if isinstance(text, str) else json.dumps(metadata)},
    )
    return target


@torch.no_grad()
def test_the_file_alone_rebuilds_the_model_to_the_last_bit(packed):
    model, path, _ = packed
    loaded = load_packed(path)
    assert type(loaded) is type(model) and not loaded.training
    x = image(64, 64, seed=3, batch=2)
    assert torch.equal(
        loaded.encode_decode(x, [dict(ori_shape=(64, 64), img_shape=(64, 64))] * 2),
        model.encode_decode(x, [dict(ori_shape=(64, 64), img_shape=(64, 64))] * 2),
    )


@torch.no_grad()
def test_the_users_own_config_does_as_well_quantized_or_not(packed):
    model, path, cfg = packed
    for own in (cfg, Config(dict(model=MODEL, default_scope='mmseg'))):
        x = image(64, 64, seed=4)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                load_packed(path, own).backbone(x), model.backbone(x), strict=True
            )
        )


@torch.no_grad()
def test_a_file_of_a_recipe_by_layer(tmp_path):
    torch.manual_seed(0)
    recipe = load_recipe(mixed(load_recipe('minmax_w4a4')))
    cfg = quantized_config(
        Config(dict(model=MODEL, default_scope='mmseg')), recipe, 'backbone'
    )
    model = randomized(build_in('mmseg', cfg.model))
    backbone, path = model.backbone, tmp_path / 'a.safetensors'
    calibrate(
        backbone,
        find_spec(backbone).block_names(backbone),
        [Call((image(64, 64),))],
        backbone.quantization.recipe.build_method(),
    )
    write_packed(model, cfg, about(recipe), None, path)
    assert {weight['bits'] for weight in content_of(path)['weights'].values()} == {4, 8}
    assert content_of(path)['mmptq']['recipe']['layers'] == recipe['layers']
    loaded, x = load_packed(path), image(64, 64, seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.backbone(x), backbone(x), strict=True)
    )
    qkv = 'backbone.stages.0.blocks.0.attn.w_msa.qkv.weight'
    for bits, message in (
        (6, f'{qkv} is to have 4 or 8 bits'),
        (True, '4 or 8 bits'),
        ([4], '4 or 8 bits'),
        (4, 'codes of 4 bits in'),
    ):
        rewritten(
            path,
            tmp_path / 'b.safetensors',
            content=lambda content, bits=bits: content['weights'][qkv].update(
                bits=bits
            ),
        )
        with pytest.raises(QuantizationError, match=message):
            load_packed(tmp_path / 'b.safetensors')


def test_metadata_is_json_that_says_what_the_file_is(packed):
    model, path, _ = packed
    content, names = content_of(path), set(safetensors.torch.load_file(path))
    assert content['version'] == 1
    assert (
        content['mmptq']['version'] == __version__
        and content['mmptq']['scope'] == 'backbone'
    )
    assert (
        content['mmptq']['recipe']['name'] == 'adalog_w4a4'
        and content['mmptq']['bits']['weight'] == 4
    )
    assert (
        content['model']['backbone']['type'] == 'mmseg.SwinTransformer'
        and content['default_scope'] == 'mmseg'
    )
    assert content['model']['data_preprocessor']['size'] == {'__tuple__': [64, 64]}
    assert content['dataset_meta'] == dict(
        classes={'__tuple__': ['a', 'b', 'c']}, palette=[[0, 0, 0]]
    )
    qkv = 'backbone.stages.0.blocks.0.attn.w_msa.qkv'
    assert content['weights'][f'{qkv}.weight'] == dict(bits=4, shape=[24, 8])
    assert {
        f'{qkv}.{part}'
        for part in ('weight', 'bias', 'weight_quantizer.scale', 'rescale.gain')
    } <= names
    assert set(model.state_dict()) <= names and names - set(model.state_dict()) == {
        *(
            f'{name}.{part}'
            for name in content['adalog']
            for part in ('shift', 'mantissa')
        ),
        *(name for name in names if name.endswith('.rescale.gain')),
    }
    back = read_packed(path)
    assert back['packed']['model'] == MODEL and back['meta']['dataset_meta'][
        'classes'
    ] == ('a', 'b', 'c')


@torch.no_grad()
def test_the_documented_reader_gets_the_weights_that_are_multiplied(packed):
    model, path, _ = packed
    code = re.search(
        r'```python\n(import json.*?)```',
        (ROOT / 'docs' / 'packed.md').read_text(),
        re.S,
    )[1]
    found = {}
    exec(code.replace('quantized.safetensors', str(path)), found)
    ops = {
        f'{name}.weight': op
        for name, op in operations(model).items()
        if 'weight' in op.roles
    }
    assert set(found['values']) == set(ops) and any(
        getattr(op, 'rescale', None) is not None for op in ops.values()
    )
    for name, op in ops.items():
        rescale = getattr(op, 'rescale', None)
        read = op.weight if rescale is None else rescale.weight(op.weight)
        assert torch.equal(
            torch.from_numpy(found['values'][name]), op.quantizer('weight')(read)
        )


def test_a_runner_reads_it_by_mmengines_loader(packed):
    _, path, _ = packed
    checkpoint = CheckpointLoader.load_checkpoint(str(path), 'cpu', logger='silent')
    assert checkpoint['state_dict'].keys() == read_packed(path)['state_dict'].keys()


@pytest.mark.parametrize(
    'changes, part',
    [
        (dict(content=lambda c: c.update(version=2)), 'version 2.*reads version 1'),
        (dict(content=lambda c: c.pop('version') and None), 'version None'),
        (dict(content=lambda c: '{"weights": '), 'no JSON'),
        (dict(content=lambda c: '[' * 100_000), 'no JSON'),
        (dict(content=lambda c: '[]'), 'version None'),
        (dict(content=lambda c: c.pop('weights') and None), 'no dict weights'),
        (dict(content=lambda c: c.pop('model') and None), 'no dict model'),
        (dict(content=lambda c: c['mmptq'].pop('recipe') and None), 'recipe'),
        (dict(content=lambda c: c['mmptq'].pop('scope') and None), 'does not say how'),
        (dict(content=lambda c: c.update(mmptq={})), 'recipe'),
        (
            dict(content=lambda c: next(iter(c['weights'].values())).update(bits=3)),
            r'projection\.weight.*4 bits',
        ),
        (
            dict(content=lambda c: next(iter(c['weights'].values())).update(shape=[8])),
            r'projection\.weight.*shape',
        ),
        (
            dict(
                content=lambda c: next(iter(c['weights'].values())).update(
                    shape=[4, 3, 4, 4]
                )
            ),
            r'projection\.weight is to hold',
        ),
        (
            dict(
                content=lambda c: next(iter(c['weights'].values())).update(
                    shape=[3, 8, 4, 4]
                )
            ),
            r'projection.*scale',
        ),
        (dict(content=lambda c: c['weights'].popitem() and None), r'weight'),
        (dict(content=lambda c: c['adalog'].append('nothing')), 'nothing'),
        (dict(content=lambda c: c['adalog'].pop() and None), 'mantissa'),
        (
            dict(content=lambda c: c['model']['backbone'].update(embed_dims=16)),
            r'another model.*projection\.weight has the shape \(8, 3, 4, 4\)',
        ),
        (
            dict(content=lambda c: c['model']['backbone'].update(depths=[1, 1])),
            'parameters of quantizers',
        ),
        (
            dict(content=lambda c: c['model']['decode_head'].update(colour=1)),
            'cannot be built.*colour',
        ),
        (
            dict(content=lambda c: c['mmptq'].update(scope='model')),
            'another model|lacks parameters',
        ),
        (
            dict(tensors=lambda t: t.pop('backbone.norm1.weight')),
            r'lacks backbone\.norm1\.weight',
        ),
        (
            dict(tensors=lambda t: t.update({'backbone.norm1.weight': torch.ones(3)})),
            r'backbone\.norm1\.weight',
        ),
        (
            dict(
                tensors=lambda t: t.update(
                    {'backbone.norm1.weight': torch.full((16,), torch.nan)}
                )
            ),
            r'norm1\.weight.*NaN',
        ),
        (
            dict(
                tensors=lambda t: t.pop(
                    'backbone.stages.0.blocks.0.attn.w_msa.qkv.weight'
                )
            ),
            r'qkv\.weight is missing',
        ),
        (
            dict(
                tensors=lambda t: t.pop(
                    'backbone.stages.0.blocks.0.attn.w_msa.qk.left_quantizer.scale'
                )
            ),
            r'lacks.*qk\.left_quantizer\.scale',
        ),
        (
            dict(
                tensors=lambda t: t.update(
                    {'backbone.surplus_quantizer.scale': torch.ones(())}
                )
            ),
            r'surplus_quantizer\.scale',
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_files_name(
    packed, tmp_path, changes, part
):
    path = rewritten(packed[1], tmp_path / 'changed.safetensors', **changes)
    with pytest.raises(QuantizationError, match=part) as error:
        load_packed(path)
    assert 'changed.safetensors' in str(error.value)


def test_damaged_and_foreign_files_are_refused(packed, tmp_path):
    whole = packed[1].read_bytes()
    path = tmp_path / 'damaged.safetensors'
    for content in (
        b'',
        whole[:5],
        whole[:1000],
        whole[:-1],
        whole + b'\0',
        b'\xff' * 100,
    ):
        path.write_bytes(content)
        with pytest.raises(
            QuantizationError, match=r'damaged\.safetensors.*damaged or truncated'
        ):
            read_packed(path)
    torch.save({'state_dict': {}}, path)
    with pytest.raises(QuantizationError, match=r'damaged\.safetensors'):
        read_packed(path)
    safetensors.torch.save_file({'w': torch.ones(2)}, path)
    with pytest.raises(QuantizationError, match='no packed checkpoint of mmptq'):
        read_packed(path)
    with pytest.raises(QuantizationError, match=r'absent\.safetensors does not exist'):
        read_packed(tmp_path / 'absent.safetensors')
    with pytest.raises(QuantizationError, match='is no file'):
        read_packed(tmp_path)


@pytest.mark.parametrize(
    'change',
    [
        lambda model: model['decode_head'].update(
            type='os.system', command='touch evil_was_here'
        ),
        lambda model: model.update(
            type='subprocess.check_output', args=['touch', 'evil_was_here']
        ),
        lambda model: model['decode_head']['loss_decode'].update(
            type='mmengine.load', file='evil.pkl'
        ),
        lambda model: model['decode_head'].update(norm_cfg=[dict(type='pathlib.Path')]),
        lambda model: model['decode_head'].update(
            conv_cfg=dict(type='__import__("os").mkdir("evil_was_here")')
        ),
        lambda model: model['backbone'].update(_scope_='evil_package'),
        lambda model: model['backbone'].update(type=['Swin']),
    ],
)
def test_what_a_config_names_is_not_called_unless_it_is_registered(
    packed, tmp_path, monkeypatch, change
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evil_package').mkdir()
    (tmp_path / 'evil_package' / '__init__.py').write_text('')
    (tmp_path / 'evil_package' / 'registry.py').write_text(
        'import os; os.mkdir("evil_was_here")'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = rewritten(
        packed[1],
        tmp_path / 'evil.safetensors',
        content=lambda content: change(content['model']),
    )
    with pytest.raises(
        QuantizationError,
        match=r'evil\.safetensors.*(not on the list|unknown|no name of a class)',
    ):
        load_packed(path)
    assert (
        not (tmp_path / 'evil_was_here').exists()
        and 'evil_package.registry' not in sys.modules
    )


@pytest.mark.parametrize('name', [*DETECTORS, *SEGMENTORS, *OWN])
def test_models_that_can_be_quantized_are_on_the_list(name):
    cfg = config_of(name)
    model = packed_model(cfg)
    assert trusted_model(_from_json(model), cfg.default_scope)['type'] == model['type']


@pytest.mark.parametrize('value', [torch.ones(2), torch.nn.ReLU, {1: 2}])
def test_a_config_that_is_not_plain_data_cannot_be_packed(packed, tmp_path, value):
    model, _, cfg = packed
    cfg = Config(dict(cfg.to_dict()))
    cfg.model.decode_head['odd'] = value
    said = about(load_recipe('minmax_w4a4'))
    with pytest.raises(
        QuantizationError, match=r'model\.decode_head\.odd cannot be packed'
    ):
        write_packed(model, cfg, said, None, tmp_path / 'b.safetensors')
    assert not os.listdir(tmp_path)


def test_only_a_calibrated_model_is_packed_and_under_its_suffix(packed, tmp_path):
    model, _, cfg = packed
    with pytest.raises(QuantizationError, match=r'b\.pth.*\.safetensors'):
        write_packed(model, cfg, {}, None, tmp_path / 'b.pth')
    with pytest.raises(QuantizationError, match='not calibrated'):
        write_packed(
            build_in('mmseg', cfg.model), cfg, {}, None, tmp_path / 'b.safetensors'
        )


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    packed, tmp_path, monkeypatch
):
    model, _, cfg = packed
    path = tmp_path / 'a.safetensors'
    path.write_bytes(b'old')

    def full(tensors, target, metadata):
        with open(target, 'wb') as file:
            file.write(b'half')
        raise OSError('no space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(OSError):
        write_packed(model, cfg, {}, None, path)
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.safetensors']
