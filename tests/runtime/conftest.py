"""Operations of integers in real clothes, and small backbones that are calibrated once."""

import copy

import pytest
import torch

from mmptq import QuantizationError
from mmptq.apis import load_recipe
from mmptq.backbones import find_spec
from mmptq.backbones.timm_import import import_timm
from mmptq.calibration import Call, calibrate
from mmptq.quantizers import UniformQuantizer
from mmptq.runtime import kernels

from ..conftest import FAST, SWIN, VIT, build_in, image, mixed, randomized

DEEP = dict(
    type='mmptq.TimmBackbone',
    embed_dim=16,
    depth=3,
    num_heads=2,
    mlp_ratio=2,
    out_indices=(0, 1),
)
STAGES = dict(
    type='mmptq.TimmBackbone',
    img_size=64,
    embed_dim=8,
    depths=(2, 1, 1),
    num_heads=(1, 2, 4),
    window_size=4,
    mlp_ratio=2,
    out_indices=(0, 1),
)
BACKBONES = {
    'mmdet swin': ('mmdet', SWIN),
    'mmseg swin': ('mmseg', SWIN),
    'mmseg vit': ('mmseg', VIT),
    'mmseg beit': (
        'mmseg',
        dict(
            type='BEiT',
            img_size=(49, 70),
            patch_size=16,
            embed_dims=16,
            num_layers=2,
            num_heads=2,
            mlp_ratio=2,
            out_indices=(0, 1),
        ),
    ),
    'timm vit': (
        'mmseg',
        dict(DEEP, model_name='vit_tiny_patch16_224', img_size=(48, 32)),
    ),
    'timm vit scaled': (
        'mmseg',
        dict(
            DEEP, model_name='vit_tiny_patch16_224', img_size=(48, 32), init_values=0.5
        ),
    ),
    'timm vit normed': (
        'mmseg',
        dict(DEEP, model_name='vit_tiny_patch16_224', img_size=(48, 32), qk_norm=True),
    ),
    'timm eva02': (
        'mmseg',
        dict(DEEP, model_name='eva02_tiny_patch14_224', img_size=56),
    ),
    'timm swin': ('mmseg', dict(STAGES, model_name='swin_tiny_patch4_window7_224')),
    'timm swin_v2': ('mmseg', dict(STAGES, model_name='swinv2_tiny_window8_256')),
}
"""Fused ones first; of the others BEiT, EVA and Swin V2 read the weight of their
projection themselves.
"""
RECIPES = (
    'minmax_w8a8',
    'minmax_w8a8_symmetric',
    'adalog_w4a4',
    'uqvit_w4a4',
    'mmptq_w4a4_uniform',
)
IMAGES = [image(49, 70, seed=seed) for seed in range(2)]
"""No whole number of patches or windows: all is padded."""
_READY = {}


@pytest.fixture
def uncompiled(monkeypatch):
    """Without torch.compile, which takes seconds for each width."""
    monkeypatch.setattr(kernels, 'has_compiler', lambda: False)


def ready(name, recipe='minmax_w8a8'):
    """A fresh copy of a calibrated backbone."""
    if (name, recipe) not in _READY:
        if name.startswith('timm'):
            try:
                import_timm()
            except QuantizationError as error:
                pytest.skip(str(error))
        scope, cfg = BACKBONES[name]
        loaded = load_recipe(recipe.removesuffix(' mixed'))
        if loaded['method']['type'] == 'AdaLog':
            loaded['method'].update(FAST)
        if recipe.endswith(' mixed'):
            loaded = mixed(loaded)
        torch.manual_seed(0)
        backbone = randomized(
            build_in(
                scope, dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=loaded)
            )
        )
        calibrate(
            backbone,
            find_spec(backbone).block_names(backbone),
            [Call((x,)) for x in IMAGES],
            backbone.quantization.recipe.build_method(),
            seed=0,
        )
        _READY[name, recipe] = backbone
    return copy.deepcopy(_READY[name, recipe])


def whole(scale, zero_point, bits, axis=None):
    """A calibrated uniform quantizer of given parameters; lists along an axis."""
    quantizer = UniformQuantizer(bits, axis=axis)
    scale, zero_point = (
        torch.as_tensor(scale, dtype=torch.float32),
        torch.as_tensor(zero_point, dtype=torch.int32),
    )
    params = dict(scale=scale.expand(zero_point.shape).clone(), zero_point=zero_point)
    quantizer.set(
        **(
            params
            if axis is None
            else {key: quantizer.ungrouped(value) for key, value in params.items()}
        )
    )
    return quantizer
