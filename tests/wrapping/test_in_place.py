"""The door for Python users: what it gives, and a module quantized without a config."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import mmptq
from mmptq.calibration import operations

from ..conftest import SWIN, TwoProducts, build_in, image, randomized


def test_the_door_gives_what_it_says_and_nothing_else():
    assert set(dir(mmptq)) == set(mmptq.__all__)
    for name in mmptq.__all__:
        assert getattr(mmptq, name) is not None
    with pytest.raises(AttributeError, match='quantise'):
        _ = mmptq.quantise


def test_to_import_mmptq_imports_nothing_heavy():
    code = (
        'import sys, mmptq; print({"torch", "mmengine", "pydantic"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'set()', done.stderr


@torch.no_grad()
def test_a_swin_is_quantized_in_place():
    float_model = randomized(build_in('mmdet', SWIN))
    model = copy.deepcopy(float_model)
    x = image(64, 64)
    results = mmptq.quantize_(model, [x, image(48, 64, seed=1)], 'minmax_w8a8')
    assert next(result.name for result in results) == 'patch_embed'
    ratios = [ratio for result in results for ratio in result.sqnr_db.values()]
    assert len(ratios) == len(operations(model)) and min(ratios) > 20
    for quantized, plain in zip(model(x), float_model(x), strict=True):
        error = (quantized - plain).norm() / plain.norm()
        assert 0 < error < 0.1


class Small(nn.Module):
    """A backbone that no one knows: two attentions in a row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([TwoProducts(), TwoProducts()])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).transpose(1, 2).flatten(2)
        return x


@torch.no_grad()
def test_a_module_of_ones_own_needs_a_spec():
    model = Small().eval()
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    with pytest.raises(mmptq.QuantizationError, match='BackboneSpec'):
        mmptq.quantize_(model, [x])
    spec = mmptq.BackboneSpec(
        classes=('tests.Small',),
        blocks=('layers.*',),
        attentions=('layers.*',),
        sites={'layers.*.qkv': 'linear'},
    )
    mmptq.quantize_(model, [(x,)], 'minmax_w8a8', spec=spec)
    error = (model(x) - plain).norm() / plain.norm()
    assert 0 < error < 0.05
    with pytest.raises(mmptq.QuantizationError, match='empty'):
        mmptq.quantize_(Small().eval(), [], 'minmax_w8a8', spec=spec)
