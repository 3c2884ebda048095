"""``to_integer``: what is replaced, what it says of it, and what it refuses."""

import copy
import logging

import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.apis import load_recipe
from mmptq.backbones import Recipe
from mmptq.layers import QuantLinear, QuantOp
from mmptq.runtime import convert, kernels, to_integer
from mmptq.runtime.base import IntegerOp
from mmptq.runtime.blocks import IntegerBlock
from mmptq.runtime.errors import NoIntegerForm

from ..conftest import SWIN, VIT, build_in, image, quantizable
from .conftest import IMAGES, RECIPES, ready
from .test_blocks import relative

pytestmark = pytest.mark.usefixtures('uncompiled')


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_operation_is_replaced_and_named(recipe):
    backbone = ready('mmdet swin', recipe)
    names = [
        name for name, module in backbone.named_modules() if isinstance(module, QuantOp)
    ]
    paths = to_integer(backbone)
    assert list(paths) == names and not any(
        isinstance(module, QuantOp) for module in backbone.modules()
    )
    assert len(
        [module for module in backbone.modules() if isinstance(module, IntegerOp)]
    ) == len(names)
    assert sum(
        isinstance(module, IntegerBlock) for module in backbone.modules()
    ) == sum(SWIN['depths'])
    for name, path in paths.items():
        table = recipe == 'adalog_w4a4' and name.endswith(('pv', 'ffn.layers.1'))
        assert (
            path.startswith('AdaLog table values')
            if table
            else 'int' in path and 'AdaLog' not in path
        ), name


@torch.no_grad()
def test_what_has_no_integer_form_stays_as_it_is_with_its_reason():
    """A recipe that keeps the inputs of fc2 in float; its blocks are not fused."""
    raw = load_recipe('minmax_w8a8')
    raw['quantizers']['post_gelu'] = dict(type='Float')
    backbone = build_in(
        'mmseg',
        dict(
            type='mmptq.QuantBackbone',
            backbone=VIT,
            recipe=Recipe.from_dict(raw).to_dict(),
        ),
    )
    backbone.eval()
    from mmptq.backbones import find_spec
    from mmptq.calibration import Call, calibrate

    calibrate(
        backbone,
        find_spec(backbone).block_names(backbone),
        [Call((x,)) for x in IMAGES],
        backbone.quantization.recipe.build_method(),
        seed=0,
    )
    expected = backbone(IMAGES[0])
    paths = to_integer(backbone)
    simulated = {
        name: path for name, path in paths.items() if path.startswith('simulated')
    }
    assert set(simulated) == {f'layers.{index}.ffn.layers.1' for index in range(3)}
    assert set(simulated.values()) == {'simulated: its input is float'}
    assert not any(isinstance(module, IntegerBlock) for module in backbone.modules())
    assert (
        max(relative(a, b) for a, b in zip(backbone(IMAGES[0]), expected, strict=True))
        <= 1e-2
    )


def test_only_what_has_no_integer_form_is_passed_over(monkeypatch):
    """A NotImplementedError of torch's, or of a bug, is no reason to simulate."""

    def raises(error):
        def integer_form(*_):
            raise error

        return {**convert.INTEGER, QuantLinear: integer_form}

    monkeypatch.setattr(
        convert, 'INTEGER', raises(NotImplementedError('no kernel for this'))
    )
    with pytest.raises(NotImplementedError, match='no kernel for this'):
        to_integer(ready('mmdet swin'))
    monkeypatch.setattr(convert, 'INTEGER', raises(NoIntegerForm('it is a toy')))
    paths = to_integer(ready('mmdet swin'))
    assert paths['stages.0.blocks.0.ffn.layers.1'] == 'simulated: it is a toy'
    assert paths['stages.0.blocks.0.attn.w_msa.qk'] == 'integers, exact in float32'


def test_an_operation_of_a_kind_that_the_runtime_does_not_know_says_so():
    """A subclass may compute something else, so that it has no form unless it is named."""
    backbone = ready('mmdet swin')
    layer = backbone.stages[0].blocks[0].ffn.layers[1]
    layer.__class__ = type('OwnLinear', (QuantLinear,), {})
    paths = to_integer(backbone)
    assert (
        paths['stages.0.blocks.0.ffn.layers.1']
        == 'simulated: OwnLinear has no entry in mmptq.runtime.convert.INTEGER'
    )
    assert backbone.stages[0].blocks[0].ffn.layers[1] is layer


def test_a_model_that_is_not_quantized_or_calibrated_or_converted_already():
    with pytest.raises(
        QuantizationError, match='Linear has no quantized operations; quantize it first'
    ):
        to_integer(nn.Linear(2, 2))
    with pytest.raises(
        QuantizationError,
        match=r'quantizers are not calibrated, the first is .*_quantizer; calibrate',
    ):
        to_integer(quantizable('mmdet', SWIN))
    half = ready('mmdet swin')
    half.stages[1].blocks[0].ffn.layers[1].input_quantizer.clear()
    with pytest.raises(
        QuantizationError,
        match=(
            r'1 quantizers are not'
            r' calibrated.*stages\.1\.blocks\.0\.ffn\.layers\.1\.input_quantizer'
        ),
    ):
        to_integer(half)
    assert any(isinstance(module, QuantOp) for module in half.modules())
    backbone = ready('mmdet swin')
    to_integer(backbone)
    with pytest.raises(QuantizationError, match='runs in integers already'):
        to_integer(backbone)


def test_training_mode_and_several_devices_are_refused():
    backbone = ready('mmdet swin')
    backbone.train()
    with pytest.raises(QuantizationError, match=r'training mode; call its eval\(\)'):
        to_integer(backbone)
    backbone = ready('mmdet swin')
    backbone.stages[1].blocks[0].to('meta')
    with pytest.raises(QuantizationError, match='several devices: cpu, meta'):
        to_integer(backbone)
    assert any(isinstance(module, QuantOp) for module in backbone.modules())


@pytest.mark.parametrize('name', ['mmdet swin', 'mmseg vit', 'timm vit'])
@torch.no_grad()
def test_a_cpu_without_vnni_runs_and_says_that_it_is_slow(name, monkeypatch, caplog):
    """Layers by ``torch._int_mm``; convolutions, which torch has no integers for then,
    simulated.
    """
    backbone, converted = ready(name), ready(name)
    monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: False)
    monkeypatch.setattr(logging.getLogger('mmengine'), 'propagate', True)
    paths = to_integer(converted)
    assert (
        sum(
            'no VNNI' in record.getMessage() and 'slow' in record.getMessage()
            for record in caplog.records
        )
        == 1
    )
    assert {
        'by _int_mm' in path
        for op, path in paths.items()
        if op.endswith(('attn.proj', 'qkv', 'in_proj', 'fc1'))
    } == {True}
    assert {path for path in paths.values() if path.startswith('simulated')} == {
        'simulated: integer convolutions need oneDNN and a CPU with VNNI'
    }
    images = [image(49, 70, seed=seed) for seed in range(3)]
    errors = [
        max(relative(a, b) for a, b in zip(converted(x), backbone(x), strict=True))
        for x in images
    ]
    assert sorted(errors)[1] <= 1e-6


def test_without_a_compiler_one_line_says_so(monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setattr(logging.getLogger('mmengine'), 'propagate', True)
    monkeypatch.setattr(kernels.shutil, 'which', lambda name: None)
    kernels.has_compiler.cache_clear()
    try:
        backbone = ready('mmdet swin')
        to_integer(backbone)
        with torch.no_grad():
            backbone(IMAGES[0])
            backbone(IMAGES[1])
        assert (
            sum('no C++ compiler' in record.getMessage() for record in caplog.records)
            == 1
        )
    finally:
        kernels.has_compiler.cache_clear()


@torch.no_grad()
def test_a_batch_of_no_images_is_named():
    backbone = ready('mmdet swin')
    to_integer(backbone)
    with pytest.raises(QuantizationError, match='batch of 0 images'):
        backbone(torch.empty(0, 3, 49, 70))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_inputs_of_a_linear_layer_in_a_model(dtype):
    """An autocast hands half-precision tokens to float layers and integer ones alike."""
    backbone = ready('mmseg vit')
    to_integer(backbone)
    expected = backbone(IMAGES[0])
    with torch.autocast('cpu', dtype=dtype):
        result = backbone(IMAGES[0])
    assert all(
        a.shape == b.shape and torch.isfinite(a).all()
        for a, b in zip(result, expected, strict=True)
    )
    assert (
        max(relative(a.float(), b) for a, b in zip(result, expected, strict=True))
        <= 0.1
    )


@torch.no_grad()
def test_maps_whose_size_does_not_fit_the_tokens_are_refused():
    """As by Swin itself."""
    backbone = ready('mmdet swin')
    to_integer(backbone)
    with pytest.raises((QuantizationError, AssertionError, RuntimeError, IndexError)):
        backbone.stages[0].blocks[0](torch.randn(1, 30, 8), (6, 6))


@pytest.mark.parametrize('family', ['mmdet swin', 'mmseg vit'])
def test_a_batch_is_its_images_and_needs_no_no_grad(family):
    backbone = ready(family, 'minmax_w8a8')
    to_integer(backbone)
    images = torch.cat([image(45, 57, seed=seed) for seed in range(2)])
    outputs = backbone(images)
    assert not any(output.requires_grad for output in outputs)
    for number in range(2):
        for whole, single in zip(
            outputs, backbone(images[number : number + 1]), strict=True
        ):
            torch.testing.assert_close(whole[number], single[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_a_model_that_is_not_in_float32_is_refused(dtype):
    backbone = ready('mmseg vit').to(dtype)
    with pytest.raises(
        QuantizationError,
        match=(
            rf'parameters of {dtype}; integers need float32: call its float\(\) first'
        ),
    ):
        to_integer(backbone)
    to_integer(backbone.float())


@torch.no_grad()
def test_a_converted_model_is_copied_and_not_saved(tmp_path):
    backbone = ready('mmdet swin')
    to_integer(backbone)
    again = copy.deepcopy(backbone)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again(IMAGES[0]), backbone(IMAGES[0]), strict=True)
    )
    with pytest.raises(
        QuantizationError,
        match='a model in integers cannot be saved; save the calibrated one',
    ):
        torch.save(backbone, tmp_path / 'model.pth')


@pytest.mark.parametrize('shape', [(1, 4, 49, 70), (3, 49, 70), (1, 3, 3, 70)])
def test_images_that_do_not_fit_the_patch_embedding_are_named(shape):
    backbone = ready('mmdet swin')
    to_integer(backbone)
    with pytest.raises(
        QuantizationError,
        match=(
            r'a convolution of 3 channels, whose outputs see 4 x 4 inputs, got a tensor'
            r' of shape'
        ),
    ):
        backbone.patch_embed.projection(torch.randn(shape))
    with pytest.raises(
        QuantizationError,
        match=r'a block of 8 channels got tokens of shape \(1, 6, 9\)',
    ):
        backbone.stages[0].blocks[0](torch.randn(1, 6, 9), (2, 3))
    with pytest.raises(QuantizationError, match=r'got tokens of shape \(1, 0, 8\)'):
        backbone.stages[0].blocks[0](torch.randn(1, 0, 8), (0, 3))
