"""timm's Vision Transformer, classifier included, on a tiny one with random weights."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.backbones.presets import load_recipe
from mmptq.backbones.reasons import FloatReason
from mmptq.backbones.spec import matches
from mmptq.backbones.timm import TIMM_VIT
from mmptq.backbones.timm_import import FOLDER, import_timm
from mmptq.calibration import Call, Stream, calibrate, operations
from mmptq.layers import QuantConv2d, QuantLinear, QuantMatMul, QuantOp

from ..conftest import image, quantizers_of, randomized

try:
    timm = import_timm()
except QuantizationError as error:
    pytest.skip(str(error), allow_module_level=True)

DEPTH = 2
TINY = dict(
    img_size=32,
    patch_size=8,
    embed_dim=16,
    depth=DEPTH,
    num_heads=2,
    mlp_ratio=2,
    num_classes=5,
)
BLOCKS = ['patch_embed', 'blocks.0', 'blocks.1', 'head']


def tiny(cls=None, **options):
    torch.manual_seed(0)
    return randomized((cls or timm.models.VisionTransformer)(**{**TINY, **options}))


def quantizable(name='minmax_w8a8', **options):
    """A tiny model, converted, and the report."""
    model = tiny(**options)
    return model, convert(model, find_spec(model), Recipe.from_dict(load_recipe(name)))


def calibrated(name='minmax_w8a8', images=2, **options):
    """A tiny model, calibrated; the blocks that were; and the report."""
    model, report = quantizable(name, **options)
    names = find_spec(model).block_names(model)
    inputs = [Call((image(32, 32, seed),)) for seed in range(images)]
    done = []
    calibrate(
        model,
        names,
        inputs,
        report.recipe.build_method(),
        seed=0,
        on_block=lambda result: done.append(result.name),
    )
    assert done == names
    return model, report


def relative_error(model, reference):
    """On the images of :func:`calibrated`, which no range cuts off."""
    x = torch.cat([image(32, 32, seed) for seed in range(2)])
    with torch.no_grad():
        return float((model(x) - reference(x)).norm() / reference(x).norm())


STOCK = """
import sys
import mmptq.apis, mmptq.backbones.timm, mmseg.models
assert not [name for name, module in sys.modules.items() if (getattr(module, '__file__', None) or '').startswith(sys.argv[1])]
"""


def test_neither_the_package_nor_the_stock_stack_sees_it():
    """mmsegmentation would import it, and fail on torchvision beside a CPU build of
    torch.
    """
    subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', STOCK, str(FOLDER)],
        check=True,
        timeout=300,
    )


def test_the_spec_is_found_for_it_and_its_subclasses():
    assert find_spec(tiny()) is TIMM_VIT
    assert find_spec(tiny(timm.models.deit.VisionTransformerDistilled)) is TIMM_VIT


def test_blocks_are_those_that_run_and_hold_every_layer():
    model = tiny()
    assert TIMM_VIT.block_names(model) == BLOCKS
    ran = []
    for name in BLOCKS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: ran.append(name)
        )
    with torch.no_grad():
        model(image(32, 32))
    assert ran == BLOCKS
    assert [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and name not in BLOCKS
        and not name.startswith(tuple(f'{block}.' for block in BLOCKS))
    ] == []


def test_every_pattern_names_something():
    names = [name for name, _ in tiny().named_modules()]
    for pattern in (*TIMM_VIT.blocks, *TIMM_VIT.attentions, *TIMM_VIT.sites):
        assert any(matches(name, (pattern,)) for name in names), pattern


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
@pytest.mark.parametrize(
    'options',
    [{}, dict(global_pool='avg'), dict(qk_norm=True), dict(num_classes=0)],
    ids=str,
)
def test_uncalibrated_it_is_the_float_model(fused, options):
    reference, (model, _) = tiny(**options), quantizable('adalog_w4a4', **options)
    for either in (reference, model):
        for block in either.blocks:
            assert isinstance(block.attn.fused_attn, bool)
            block.attn.fused_attn = fused
    model.load_state_dict(reference.state_dict(), strict=True)
    assert relative_error(model, reference) <= 1e-6


def test_every_layer_and_product_is_quantized():
    model, report = calibrated()
    ops = operations(model)
    kinds = {
        cls: sum(type(op) is cls for op in ops.values())
        for cls in (QuantConv2d, QuantLinear, QuantMatMul)
    }
    assert (
        kinds == {QuantConv2d: 1, QuantLinear: 4 * DEPTH + 1, QuantMatMul: 2 * DEPTH}
        and report.skipped == {}
    )
    assert [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, QuantOp)
    ] == []
    assert {
        name: op.sites['input']
        for name, op in ops.items()
        if op.kind != 'matmul' and not name.startswith('blocks.1')
    } == {
        'patch_embed.proj': 'image',
        'blocks.0.attn.qkv': 'post_norm',
        'blocks.0.attn.proj': 'post_attention',
        'blocks.0.mlp.fc1': 'post_norm',
        'blocks.0.mlp.fc2': 'post_gelu',
        'head': 'linear',
    }
    assert {
        name.rpartition('.')[2]: tuple(op.sites.values())
        for name, op in ops.items()
        if op.kind == 'matmul'
    } == {'qk': ('query', 'key'), 'pv': ('post_softmax', 'value')}
    assert len(quantizers_of(model)) == 2 * len(ops)
    assert [
        name
        for name, quantizer in quantizers_of(model).items()
        if quantizer.params is None
    ] == []


@pytest.mark.parametrize(
    'options',
    [{}, dict(global_pool='avg'), dict(class_token=False, global_pool='avg')],
    ids=str,
)
def test_eight_bits_err_little_and_fewer_err_more(options):
    reference = tiny(**options)
    errors = [
        relative_error(calibrated(f'minmax_w{bits}a{bits}', **options)[0], reference)
        for bits in (8, 6, 3)
    ]
    assert 0 < errors[0] < errors[1] < errors[2] and errors[0] < 0.05


@pytest.mark.parametrize('pool', ['token', 'avg'])
def test_the_head_gets_the_normed_and_pooled_output_of_the_last_block(pool):
    """What lies between the two is no part of a block, and runs in calibration all the
    same.
    """
    model, _ = quantizable(global_pool=pool)
    inputs = [Call((image(32, 32, seed),)) for seed in range(2)]
    stream = Stream(model, BLOCKS, inputs)
    for name in BLOCKS[:-1]:
        calls = stream.calls()
        with torch.no_grad():
            stream.advance(
                [model.get_submodule(name)(*call.args, **call.kwargs) for call in calls]
            )
    for call, whole in zip(stream.calls(), inputs, strict=True):
        with torch.no_grad():
            expected = model.forward_head(
                model.forward_features(*whole.args), pre_logits=True
            )
        assert torch.equal(call.args[0], expected)


def test_without_a_classifier_it_is_a_backbone():
    model, report = calibrated(num_classes=0)
    assert isinstance(model.head, nn.Identity) and report.skipped == {}


def test_a_second_classifier_stays_float_with_a_reason():
    _, report = calibrated(cls=timm.models.deit.VisionTransformerDistilled)
    assert report.skipped == {'head_dist': FloatReason.NO_SITE}
