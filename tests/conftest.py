"""Oracles written from the equations alone, and small real backbones."""

import dataclasses
import math
import os
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

from mmptq import __version__
from mmptq.apis import load_recipe
from mmptq.backbones import Recipe
from mmptq.calibration import FPCS, run_stages
from mmptq.layers import GeluShift, QuantLinear, Rescale
from mmptq.methods import AdaLog
from mmptq.quantizers import AdaLogQuantizer, Quantizer, UniformQuantizer

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when a kernel is defined

hypothesis.settings.register_profile(
    'tests', deadline=None, derandomize=True, max_examples=60, database=None
)
hypothesis.settings.load_profile('tests')

SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=4,
    mlp_ratio=2,
    strides=(4, 2),
    out_indices=(0, 1),
    drop_path_rate=0.1,
)
VIT = dict(
    type='VisionTransformer',
    img_size=(48, 32),
    patch_size=16,
    embed_dims=16,
    num_layers=3,
    num_heads=2,
    mlp_ratio=2,
    out_indices=(0, 2),
    final_norm=True,
    drop_path_rate=0.1,
)


# The equations of methods.md.


def uniform_codes(x, scale, zero_point, bits):
    """Codes, in float64, and how far each x/s is from the point where rounding changes
    it.
    """
    ratio = np.asarray(x, np.float64) / np.asarray(scale, np.float64)
    codes = np.clip(np.rint(ratio) + np.asarray(zero_point), 0, 2**bits - 1)
    return codes.astype(int), np.abs(ratio - np.floor(ratio) - 0.5)


def uniform_values(codes, scale, zero_point):
    """s (k - z) with one rounding to float32."""
    return (np.asarray(codes) - np.asarray(zero_point)).astype(np.float32) * np.asarray(
        scale, np.float32
    )


def oracle_uniform(x, scale, zero_point, bits):
    return uniform_values(
        uniform_codes(x, scale, zero_point, bits)[0], scale, zero_point
    )


def oracle_range(low, high, bits):
    """Scale and zero point that cover the range and zero."""
    low, high = (
        np.minimum(low, 0).astype(np.float64),
        np.maximum(high, 0).astype(np.float64),
    )
    scale = (high - low) / (2**bits - 1)
    scale = np.where(scale > 0, scale, 1)
    return scale, np.rint(-low / scale)


def adalog_tables(bits, q):
    """T1[k] = floor(kq/r) and T2[k] G, both with integers only: T2 G is the largest n
    with n - 1/2 <= G 2^(-((kq) mod r)/r).
    """
    largest = 2 * 2**bits - 2
    shifts, mantissas = [], []
    for k in range(2**bits):
        exponent = Fraction(q) * k / 37
        shift = math.floor(exponent)
        power, root = (exponent - shift).numerator, (exponent - shift).denominator
        n = largest
        while (2 * n - 1) ** root * 2**power > (2 * largest) ** root:
            n -= 1
        shifts.append(shift)
        mantissas.append(n)
    return shifts, mantissas, largest


def adalog_values(bits, q, scale=1.0, strict=False):
    """The value of every code and, last, of the one that means zero; rounded once, to
    float32.
    """
    shifts, mantissas, largest = adalog_tables(bits, q)
    exact = [
        Fraction(float(np.float32(scale))) * n / (largest * 2**t)
        for t, n in zip(shifts, mantissas, strict=True)
    ]
    if strict:
        exact[-1] = Fraction(0)
    return np.array([*(float(v) for v in exact), 0.0]).astype(np.float32)


def adalog_codes(x, q, bits, scale=1.0, strict=False):
    """Codes, in float64, and how far each is from the point where rounding changes it."""
    ratio = np.clip(np.asarray(x, np.float64) / float(np.float32(scale)), 0, 1)
    with np.errstate(divide='ignore', invalid='ignore'):  # zero is beyond all codes
        k = -np.log2(ratio) * 37 / q
        return np.minimum(np.rint(k), 2**bits - strict).astype(int), np.nan_to_num(
            np.abs(k - np.floor(k) - 0.5), nan=0.5
        )


def oracle_adalog(x, q, bits, **options):
    return adalog_values(bits, q, **options)[adalog_codes(x, q, bits, **options)[0]]


# Quantizers and operations.


def uniform(low, high, bits=4, axis=None):
    """A calibrated quantizer for [low, high]; with an axis these are lists."""
    quantizer = UniformQuantizer(bits, axis=axis)
    low, high = (
        torch.as_tensor(low, dtype=torch.float32),
        torch.as_tensor(high, dtype=torch.float32),
    )
    params = quantizer.range_params(low, high)
    quantizer.set(
        **(
            params
            if axis is None
            else {key: quantizer.ungrouped(value) for key, value in params.items()}
        )
    )
    return quantizer


def covering(x, bits=4, axis=None):
    """A calibrated quantizer for the extremes of a tensor, of each slice along an axis."""
    values = UniformQuantizer(bits, axis=axis).grouped(x.detach())
    if axis is None:
        return uniform(values.min(), values.max(), bits)
    return uniform(values.amin(1), values.amax(1), bits, axis)


def adalog(bits, q, scale=1.0, **options):
    """A calibrated quantizer."""
    quantizer = AdaLogQuantizer(bits, **options)
    quantizer.set(scale=torch.tensor(scale), q=torch.tensor(float(q)))
    return quantizer


def equip(op, **quantizers):
    """Gives an operation its quantizers, uncalibrated where none is named; returns it."""
    op.set_quantizers(
        dict.fromkeys(op.roles, 'linear'),
        {role: quantizers.get(role) or UniformQuantizer(4) for role in op.roles},
    )
    return op


def rescaled(layer, cls=None, seed=0):
    """A QuantLinear of a linear layer with a random rescale of a class; quantizers to
    be set.
    """
    op = QuantLinear.from_float(layer)
    generator = torch.Generator().manual_seed(seed)
    if cls is Rescale:
        op.rescale = Rescale()
        op.rescale.set(
            scale=torch.exp(torch.randn(layer.in_features, generator=generator)),
            shift=torch.randn(layer.in_features, generator=generator),
        )
    elif cls is GeluShift:
        op.rescale = GeluShift()
        op.rescale.set(shift=torch.tensor(0.16997124254703522))
    return op


def oracle_of(quantizer, x):
    """What a calibrated quantizer makes of an array, by the equations alone."""
    params = {key: value.numpy() for key, value in quantizer.params.items()}
    if isinstance(quantizer, UniformQuantizer):
        return oracle_uniform(x, params['scale'], params['zero_point'], quantizer.bits)
    return oracle_adalog(
        x,
        float(params['q']),
        quantizer.bits,
        scale=float(params['scale']),
        strict=quantizer.strict,
    )


def sampled(op, activations, rows, seed=0):
    """A sample of an operation's activations."""
    return op.take(
        activations, op.places(activations, rows, torch.Generator().manual_seed(seed))
    )


def quantizers_of(module):
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, Quantizer)
    }


# Backbones.

FAST = dict(steps=2, width=4, candidates=16, rank=8, rounds=1, rows=64)
"""Options of AdaLog where it does not matter how well it searches."""


def plan(**options):
    """How finely AdaLog searches with some options."""
    method = AdaLog(**options)
    return FPCS(
        **{
            field.name: getattr(method, field.name)
            for field in dataclasses.fields(FPCS)
        }
    )


def fast(name='adalog_w4a4'):
    """A recipe of AdaLog with a search that takes no time."""
    raw = load_recipe(name)
    raw['method'].update(FAST)
    return raw


def mixed(raw):
    """A recipe with other bits in single layers, weights of 8 and of 4, inputs of 8,
    and with layers and products in float.
    """
    layers = {
        '*.0.*': dict(bits=dict(weight=8)),
        '*.ffn.*': dict(bits=dict(activation=8)),
        '*.ffn.layers.0.0': dict(bits=dict(weight=4)),
        '*.1.*.qk': dict(float=True),
        'patch_embed.*': dict(float=True),
    }
    return {**raw, 'layers': layers}


def randomized(module, seed=0):
    """The module with noise on all parameters, so that biases, norms and position
    tables matter; in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    module.eval()  # a Swin's returns nothing
    return module


def image(height, width, seed=0, batch=1):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(seed)
    )


def recipe(name='adalog_w4a4', **sites):
    """A recipe on disk, some sites changed, checked."""
    loaded = load_recipe(name)
    loaded['quantizers'].update(sites)
    return Recipe.from_dict(loaded)


def about(recipe, scope='backbone', **changes):
    """What a file of a model quantized by a recipe says of itself."""
    calibration = dict(
        dataset='CocoDataset',
        split='train',
        images=1,
        seed=0,
        shuffle=True,
        leak=False,
        seconds=1.5,
        peak_memory_mib=3.0,
    )
    return dict(
        version=__version__,
        method=recipe['method']['type'],
        recipe=recipe,
        bits=recipe['bits'],
        scope=scope,
        calibration=calibration,
        float=None,
        size=dict(float_mib=1.0, quantized_mib=0.5),
        layers=[],
        **changes,
    )


def build_in(scope, cfg):
    """Builds a config as a Runner does, with a default scope and no import by the
    config.
    """
    import mmseg.models  # noqa: F401
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(scope)
    return MODELS.build(cfg)


@pytest.fixture(scope='session', params=['mmdet swin', 'mmseg swin', 'mmseg vit'])
def family(request):
    """Default scope and config of a small backbone."""
    scope, name = request.param.split()
    return scope, SWIN if name == 'swin' else VIT


@pytest.fixture
def float_backbone(family):
    torch.manual_seed(0)
    return randomized(build_in(*family))


@pytest.fixture
def backbone(family):
    """The same backbone, quantizable by adalog_w4a4."""
    return quantizable(*family)


def quantizable(scope, cfg, name='adalog_w4a4'):
    torch.manual_seed(0)
    return randomized(
        build_in(
            scope,
            dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=load_recipe(name)),
        )
    )


class TwoProducts(nn.Module):
    """The least attention: two heads, made from its input by one projection."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def split(self, x):
        return (
            self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        )  # (3, batch, heads, length, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


# Stages.


def outputs_of(method, block):
    """Calibrates a block by a method or stages; the outputs of the float block."""
    run_stages(block, method)
    return block.targets


INTEGRATION = ('apis', 'export', 'test_all_models.py', 'test_configs.py')
"""Tests of whole models and commands, and those that train or compile."""

SLOW = ('test_brecq.py', 'test_blocks.py', 'test_gpu.py', 'test_lockstep.py')


def pytest_collection_modifyitems(items):
    """Marks tests by where they are: ``make check`` leaves out both kinds."""
    for item in items:
        if set(item.path.parts) & set(INTEGRATION):
            item.add_marker(pytest.mark.integration)
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
