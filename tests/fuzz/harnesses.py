"""One harness for every reader: bytes in, and nothing may come out but a result or a
QuantizationError.
"""

import io
import json
import os
import tempfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, find_spec
from mmptq.calibration import Block, Call, calibrate, operations
from mmptq.checkpoints.about import checked_about, dataset_meta, how_made
from mmptq.checkpoints.layouts import convert_keys
from mmptq.checkpoints.packed import read_packed, write_packed
from mmptq.checkpoints.plain import plain
from mmptq.checkpoints.progress import checksum, load_progress, save_progress
from mmptq.checkpoints.reading import load_checked, load_file, tensor_fault
from mmptq.checkpoints.trusted import guarded, trusted_model

from ..conftest import about, fast, image
from .choices import MOST, SHALLOW, Choices, mutated, mutated_bytes, mutated_state

FOLDER = Path(tempfile.mkdtemp(dir='/dev/shm' if os.path.isdir('/dev/shm') else None))
SWIN = dict(
    type='SwinTransformer',
    embed_dims=4,
    depths=(1, 1),
    num_heads=(1, 2),
    window_size=2,
    mlp_ratio=1,
    strides=(4, 2),
    out_indices=(0, 1),
)
MODEL = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(16, 16)),
    backbone=dict(SWIN, type='mmseg.SwinTransformer'),
    decode_head=dict(
        type='FCNHead',
        in_channels=8,
        channels=4,
        in_index=1,
        num_convs=1,
        num_classes=3,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    train_cfg=None,
    test_cfg=dict(mode='whole'),
)


class Honest:
    """A small quantized segmentor and all its files."""

    def __init__(self):
        from mmengine.config import Config
        from mmengine.registry import MODELS, init_default_scope

        from mmptq.wrapping.configs import quantized_config

        torch.manual_seed(0)
        recipe = fast('adalog_w4a4')
        self.cfg = quantized_config(
            Config(dict(model=MODEL, default_scope='mmseg')), recipe, 'backbone'
        )
        init_default_scope('mmseg')
        self.model = MODELS.build(self.cfg.model)
        self.model.eval()
        backbone = self.model.backbone
        names = find_spec(backbone).block_names(backbone)
        self.results = calibrate(
            backbone,
            names,
            [Call((image(16, 16),))],
            backbone.quantization.recipe.build_method(),
        )
        self.about = json.loads(json.dumps(about(recipe)))
        self.about['layers'] = [
            dict(
                name='a',
                kind='linear',
                site='query',
                bits=dict(input=4),
                effective_bits=dict(input=4.0),
                quantizer=dict(input='UniformQuantizer'),
                uniform=dict(input=True),
                sqnr_db=20.5,
                reason=None,
            )
        ]
        self.state = {
            key: value.clone() for key, value in self.model.state_dict().items()
        }
        self.recipe = recipe
        self.meta = dict(classes=('a', 'b'), palette=[[0, 0, 0]])
        content = {
            'state_dict': self.state,
            'meta': {'mmptq': self.about, 'dataset_meta': self.meta},
        }
        self.pth = _saved(content)
        self.pickle = pickle_of(self.pth)
        write_packed(
            self.model, self.cfg, self.about, self.meta, FOLDER / 'honest.safetensors'
        )
        self.packed = (FOLDER / 'honest.safetensors').read_bytes()
        with safetensors.safe_open(FOLDER / 'honest.safetensors', 'pt') as file:
            self.content = json.loads(file.metadata()['mmptq-packed'])
        self.tensors = safetensors.torch.load(self.packed)
        save_progress(FOLDER / 'honest.pth', 'me', self.results)
        self.progress = (FOLDER / 'honest.pth').read_bytes()


@cache
def honest():
    return Honest()


def _saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def pickle_of(whole):
    import zipfile

    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return archive.read(
            next(name for name in archive.namelist() if name.endswith('data.pkl'))
        )


def _zipped(whole, pickled):
    """The archive with another pickle."""
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, 'w') as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith('data.pkl') else old.read(name))
    return file.getvalue()


def _file(data, suffix):
    path = FOLDER / f'fuzzed{suffix}'
    path.write_bytes(data)
    return path


def _try_saved(content):
    """The file of some content; None where torch cannot write it."""
    try:
        return _saved(content)
    except Exception:  # what is not to be written needs not be read
        return None


def checkpoint_bytes(choices):
    """Bytes of a .pth file: of the archive, or of the pickle in it."""
    whole, pickled = honest().pth, honest().pickle
    data = (
        mutated_bytes(whole, choices)
        if choices.below(2)
        else _zipped(whole, mutated_bytes(pickled, choices))
    )
    checkpoint = load_file(_file(data, '.pth'))
    how_made(checkpoint, 'file')
    dataset_meta(checkpoint)


def checkpoint_trees(choices):
    """What a .pth file holds, with other values of other types."""
    content = {
        'state_dict': (
            mutated_state(honest().state, choices)
            if choices.below(2)
            else honest().state
        ),
        'meta': mutated(
            {'mmptq': honest().about, 'dataset_meta': honest().meta}, choices
        ),
    }
    if not choices.below(8):
        content = {
            **content,
            choices.of(['state_dict', 'meta', 'x']): choices.of(SHALLOW),
        }
        content = OrderedDict(content) if choices.below(2) else content
    data = _try_saved(content)
    if data is not None:
        checkpoint = load_file(_file(data, '.pth'))
        how_made(checkpoint, 'file')
        dataset_meta(checkpoint)


def packed_bytes(choices):
    """Bytes of a .safetensors file."""
    read_packed(_file(mutated_bytes(honest().packed, choices), '.safetensors'))


def packed_trees(choices):
    """What a .safetensors file says, and holds."""
    content = mutated(honest().content, choices)
    tensors = honest().tensors
    if choices.below(2):
        tensors = {
            key: value
            for key, value in mutated_state(tensors, choices).items()
            if isinstance(key, str)
            and isinstance(value, torch.Tensor)
            and value.numel() < MOST
        }
    try:
        data = safetensors.torch.save(
            {key: value.contiguous().clone() for key, value in tensors.items()},
            {'mmptq-packed': json.dumps(content)},
        )
    except Exception:  # what is not to be written needs not be read
        return
    read_packed(_file(data, '.safetensors'))


def what_it_says(choices):
    """What a file says of itself."""
    checked_about(mutated(honest().about, choices), 'file')


def recipes(choices):
    """A recipe from a file."""
    name = choices.of(
        [
            'adalog_w4a4',
            'uqvit_w4a4',
            'minmax_w4a4',
            'mmptq_w3a3_uniform',
            'adalog_w4a4_brecq',
        ]
    )
    Recipe.from_dict(mutated(_recipe(name), choices))


@cache
def _recipe(name):
    return load_recipe(name)


@cache
def _fresh():
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmseg')
    honest()
    model = MODELS.build(honest().cfg.model)
    model.eval()
    return model


def quantizer_tensors(choices):
    """A state that is loaded into the model; what is taken can be run."""
    from mmptq.quantizers import calibrated_parts

    model = _fresh()
    for part in calibrated_parts(model).values():
        part.clear()
    state = mutated_state(honest().state, choices)
    if not all(
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and not tensor_fault(value)
        for key, value in state.items()
    ):
        return  # refused when a file is read
    load_checked(model, state, 'file')
    with torch.no_grad():
        model.backbone(image(16, 16))


def claims_much(params):
    """Whether a tensor claims more than it holds: no one computes a checksum of that."""
    return isinstance(params, dict) and any(
        isinstance(value, torch.Tensor) and value.numel() > MOST
        for value in params.values()
    )


def progress_bytes(choices):
    """Bytes of a progress file."""
    load_progress(_file(mutated_bytes(honest().progress, choices), '.pth'), 'me')


def progress_trees(choices):
    """A forged progress file, its checksum right, set in the model."""
    blocks = [
        dict(vars(result), params=dict(result.params)) for result in honest().results
    ]
    block = choices.of(blocks)
    if choices.below(2):
        block['params'] = mutated_state(block['params'], choices)
    else:
        changed = mutated({'name': block['name'], 'sqnr_db': block['sqnr_db']}, choices)
        block.update(changed)
        if not choices.below(4):
            block.pop(choices.of(list(block)))
    try:
        summed = (
            checksum('me', blocks)
            if not any(claims_much(block.get('params')) for block in blocks)
            else 'x'
        )
    except Exception:  # then a forger has none
        summed = 'x'
    data = _try_saved({'identity': 'me', 'blocks': blocks, 'checksum': summed})
    if data is None:
        return
    backbone = _fresh().backbone
    for done in load_progress(_file(data, '.pth'), 'me').values():
        unit = dict(backbone.named_modules()).get(done.name)
        if unit is not None:
            Block(done.name, unit, [], operations(unit, f'{done.name}.')).load(
                done.params
            )


def models(choices):
    """The model that a packed file describes; now and then it is built."""
    content = honest().content
    scope = choices.of(['mmseg', 'mmdet', 'mmengine', 'evil', 5, ''])
    model = plain(mutated(content['model'], choices), 'model')
    model = trusted_model(
        model, scope if isinstance(scope, str) and choices.below(3) == 0 else 'mmseg'
    )
    if choices.below(20):
        return
    from mmptq.apis.packed import build_quantized

    with guarded(len(honest().state), 10_000):
        loaded = {'state_dict': honest().state, 'meta': {'mmptq': honest().about}}
        build_quantized(model, 'mmseg', how_made(loaded, 'file'), loaded, 'file')


def other_layouts(choices):
    """Checkpoints of the Swin authors and of timm, to be converted."""
    state = mutated_state(choices.of([_swin(), _vit()]), choices)
    if all(
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and not tensor_fault(value)
        for key, value in state.items()
    ):
        convert_keys(state)  # all else is refused when the file is read


@cache
def _swin():
    layers = {
        'patch_embed.proj': nn.Conv2d(3, 4, 4),
        'patch_embed.norm': nn.LayerNorm(4),
    }
    block = 'layers.0.blocks.0'
    layers |= {
        f'{block}.norm1': nn.LayerNorm(4),
        f'{block}.norm2': nn.LayerNorm(4),
        f'{block}.attn.qkv': nn.Linear(4, 12),
        f'{block}.attn.proj': nn.Linear(4, 4),
        f'{block}.mlp.fc1': nn.Linear(4, 8),
        f'{block}.mlp.fc2': nn.Linear(8, 4),
    }
    state = {
        f'{name}.{key}': value.detach()
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
    }
    return state | {
        f'{block}.attn.relative_position_bias_table': torch.zeros(9, 2),
        f'{block}.attn.relative_position_index': torch.zeros(4, 4, dtype=torch.int64),
    }


@cache
def _vit():
    block = 'blocks.0'
    layers = {
        'patch_embed.proj': nn.Conv2d(3, 4, 4),
        f'{block}.norm1': nn.LayerNorm(4),
        f'{block}.norm2': nn.LayerNorm(4),
        f'{block}.attn.qkv': nn.Linear(4, 12),
        f'{block}.attn.proj': nn.Linear(4, 4),
        f'{block}.mlp.fc1': nn.Linear(4, 8),
        f'{block}.mlp.fc2': nn.Linear(8, 4),
        'norm': nn.LayerNorm(4),
    }
    state = {
        f'{name}.{key}': value.detach()
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
    }
    return state | {
        'cls_token': torch.zeros(1, 1, 4),
        'pos_embed': torch.zeros(1, 5, 4),
    }


HARNESSES = {
    each.__name__: each
    for each in (
        checkpoint_bytes,
        checkpoint_trees,
        packed_bytes,
        packed_trees,
        what_it_says,
        recipes,
        quantizer_tensors,
        progress_bytes,
        progress_trees,
        models,
        other_layouts,
    )
}


def run(name, data):
    """Runs a harness; returns whether the input was refused. Whatever else is raised is
    a crash.
    """
    try:
        HARNESSES[name](Choices(data))
    except QuantizationError:
        return True
    return False
