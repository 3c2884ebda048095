"""The calibration of small real backbones, end to end."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.backbones import find_spec
from mmptq.backbones.presets import load_recipe
from mmptq.calibration import Block, Call, calibrate, operations
from mmptq.calibration.blockwise import sqnr_db
from mmptq.checkpoints.reading import is_calibrated, load_checked
from mmptq.layers import QuantConv2d, QuantLinear
from mmptq.methods import AdaLog, MinMax
from mmptq.quantizers import UniformQuantizer

from ..conftest import (
    FAST,
    SWIN,
    VIT,
    build_in,
    covering,
    equip,
    fast,
    image,
    oracle_of,
    outputs_of,
    quantizable,
    quantizers_of,
    randomized,
    uniform,
)


def inputs():
    return [Call((image(45, 57, seed=1),)), Call((image(32, 70, seed=2),))]


def names_of(backbone):
    return find_spec(backbone).block_names(backbone)


RECIPES = {AdaLog: 'adalog_w4a4', MinMax: 'minmax_w4a4'}


def made(method, **options):
    """A method that takes no time."""
    return method(**(FAST if method is AdaLog else {}), **options)


def calibrated(scope, cfg, method, recipe='adalog_w4a4', **options):
    """A calibrated backbone and the results."""
    backbone = quantizable(scope, cfg, recipe)
    return backbone, calibrate(
        backbone, names_of(backbone), inputs(), method, **options
    )


@torch.no_grad()
def outputs(backbone):
    return [out for call in inputs() for out in backbone(*call.args)]


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('propagate', [False, True])
@pytest.mark.parametrize('method', [MinMax, AdaLog])
def test_everything_is_calibrated(family, method, propagate):
    backbone, results = calibrated(
        *family, made(method, propagate_error=propagate), RECIPES[method]
    )
    assert is_calibrated(backbone)
    assert [result.name for result in results] == names_of(backbone)
    assert {name for result in results for name in result.sqnr_db} == set(
        operations(backbone)
    )
    found = {name for result in results for name in result.params}
    assert found == {
        name
        for name in backbone.state_dict()
        if '_quantizer.' in name or '.rescale.' in name
    }
    assert any('.rescale.' in name for name in found) == (method is AdaLog)
    assert all(
        5 < value < 60 for result in results for value in result.sqnr_db.values()
    )
    for quantized, plain in zip(
        outputs(backbone), outputs(quantizable(*family)), strict=True
    ):
        error = (quantized - plain).norm() / plain.norm()
        assert 1e-4 < error < 1


def test_a_seed_decides(family):
    first, again, other = (
        calibrated(*family, AdaLog(**{**FAST, 'rows': 4}), seed=seed)[0]
        for seed in (0, 0, 1)
    )
    assert equal(first, again) and not equal(first, other)


def test_weights_stay(family):
    backbone, plain = calibrated(*family, AdaLog(**FAST))[0], quantizable(*family)
    assert all(
        torch.equal(value, backbone.state_dict()[key])
        for key, value in plain.state_dict().items()
    )
    assert not backbone.training and all(
        'forward' not in vars(module) for module in backbone.modules()
    )


@pytest.mark.parametrize('method', [MinMax, AdaLog])
def test_checkpoints_hold_the_calibration(family, method, tmp_path):
    backbone, fresh = (
        calibrated(*family, made(method), RECIPES[method])[0],
        quantizable(*family, RECIPES[method]),
    )
    torch.save(backbone.state_dict(), tmp_path / 'a.pth')
    fresh.load_state_dict(
        torch.load(tmp_path / 'a.pth', weights_only=True), strict=True
    )
    assert equal(backbone, fresh)
    assert all(
        torch.equal(*pair)
        for pair in zip(outputs(fresh), outputs(backbone), strict=True)
    )
    shapes = {
        key.rsplit('.', 1)[1]: value.shape
        for key, value in fresh.state_dict().items()
        if '.ffn.layers.1.rescale.' in key
    }
    assert shapes == ({'shift': ()} if method is AdaLog else {})


@pytest.mark.parametrize(
    'lost',
    [
        '.rescale.',
        'qkv.rescale.scale',
        'in_proj.rescale.shift',
        'layers.1.rescale.shift',
        '_quantizer.q',
        'pv.right_quantizer.zero_point',
    ],
)
def test_checkpoints_that_lack_parameters_are_refused(family, lost):
    backbone = calibrated(*family, AdaLog(**FAST))[0]
    state = {
        key: value for key, value in backbone.state_dict().items() if lost not in key
    }
    if len(state) == len(backbone.state_dict()):
        return  # the other family's
    for load in (
        lambda fresh: fresh.load_state_dict(state, strict=False),
        lambda fresh: load_checked(fresh, state, 'a.pth'),
    ):
        with pytest.raises(
            QuantizationError, match='lacks parameters of quantizers: '
        ) as error:
            load(quantizable(*family))
        assert lost in str(error.value)


def test_checkpoints_with_parameters_of_another_granularity_are_refused(family):
    backbone = calibrated(*family, AdaLog(**FAST))[0]
    state = backbone.state_dict()
    name = next(key for key in state if key.endswith('ffn.layers.1.rescale.shift'))
    state[name] = state[name].expand(3)
    with pytest.raises(QuantizationError, match=name.replace('.', r'\.')):
        load_checked(quantizable(*family), state, 'a.pth')


def test_checkpoints_with_a_rescale_that_the_recipe_does_not_have_are_refused(family):
    backbone = calibrated(*family, MinMax(), 'minmax_w4a4')[0]
    name = next(name for name in operations(backbone) if name.endswith('ffn.layers.1'))
    with pytest.raises(QuantizationError, match=name.replace('.', r'\.')):
        load_checked(
            quantizable(*family, 'minmax_w4a4'),
            {**backbone.state_dict(), f'{name}.rescale.shift': torch.ones(())},
            'a.pth',
        )


def test_float_checkpoints_leave_everything_float(family):
    plain, backbone = quantizable(*family), quantizable(*family)
    assert load_checked(
        backbone, plain.state_dict(), 'a.pth'
    ) == [] and not is_calibrated(backbone)
    assert all(
        torch.equal(*pair)
        for pair in zip(outputs(plain), outputs(backbone), strict=True)
    )


def test_a_method_without_reparameterisation_on_a_recipe_with_one(family):
    """It would leave a checkpoint that is half calibrated."""
    scope, cfg = family
    raw = {**load_recipe('adalog_w4a4'), 'method': dict(type='MinMax')}
    with pytest.raises(QuantizationError, match='MinMax does not rescale'):
        build_in(scope, dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=raw))
    raw['quantizers'].update(
        post_norm=dict(type='UniformQuantizer'), post_gelu=dict(type='UniformQuantizer')
    )
    backbone = randomized(
        build_in(scope, dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=raw))
    )
    calibrate(backbone, names_of(backbone), inputs(), MinMax())
    assert is_calibrated(backbone)


# A site that stays float.


def half_float(method=AdaLog):
    raw = fast() if method is AdaLog else load_recipe(RECIPES[method])
    raw['quantizers']['image'] = dict(type='Float')
    torch.manual_seed(0)
    return randomized(
        build_in('mmdet', dict(type='mmptq.QuantBackbone', backbone=SWIN, recipe=raw))
    )


def test_a_float_checkpoint_loads_beside_a_site_that_stays_float():
    backbone = half_float()
    assert load_checked(
        backbone, quantizable('mmdet', SWIN).state_dict(), 'a.pth'
    ) == [] and not is_calibrated(backbone)


@pytest.mark.parametrize('method', [MinMax, AdaLog])
def test_a_site_that_stays_float(method, tmp_path):
    backbone = half_float(method)
    results = calibrate(backbone, names_of(backbone), inputs(), made(method))
    assert is_calibrated(backbone) and results[0].sqnr_db['patch_embed.projection'] > 10
    seen = []
    backbone.patch_embed.projection.register_forward_hook(
        lambda op, args, out: seen.append((op, args[0], out))
    )
    outputs(backbone)
    op, x, out = seen[0]
    expected = nn.functional.conv2d(
        x, op.weight_quantizer(op.weight), op.bias, op.stride, op.padding
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    fresh = half_float(method)
    assert load_checked(fresh, backbone.state_dict(), 'a.pth') == [] and equal(
        fresh, backbone
    )


# Taking up an interrupted run.


class Forbidden(Exception):
    pass


class OnlyAfter:
    """A method that may not be asked about blocks that are done."""

    def __init__(self, method, done):
        self.method, self.done, self.asked = method, done, []
        self.propagate_error = method.propagate_error

    def calibrate(self, block):
        if block.name in self.done:
            raise Forbidden(block.name)
        self.asked.append(block.name)
        return outputs_of(self.method, block)


@pytest.mark.parametrize('count', [1, 3, None])
@pytest.mark.parametrize('propagate', [False, True])
@pytest.mark.parametrize(
    ('scope', 'cfg'), [('mmdet', SWIN), ('mmseg', VIT)], ids=['swin', 'vit']
)
def test_blocks_that_are_done_are_taken_over(scope, cfg, propagate, count):
    method = AdaLog(**FAST, propagate_error=propagate)
    whole, results = calibrated(scope, cfg, method)
    done = {result.name: result for result in results[:count]}
    only_after = OnlyAfter(method, done)
    resumed, again = calibrated(scope, cfg, only_after, done=done)
    assert equal(whole, resumed) and only_after.asked == names_of(whole)[len(done) :]
    assert [(result.name, result.sqnr_db) for result in again] == [
        (result.name, result.sqnr_db) for result in results
    ]


def test_progress_is_told(family):
    shown, told = [], []
    _, results = calibrated(
        *family,
        MinMax(),
        on_calls=lambda block: shown.append((block.name, len(block.calls), len(told))),
        on_block=told.append,
    )
    assert (
        shown == [(result.name, 2, number) for number, result in enumerate(results)]
        and told == results
    )


# What does not go.


@pytest.mark.parametrize('bad', [float('nan'), float('-inf')])
def test_a_weight_that_is_not_finite_is_named(family, bad):
    backbone = quantizable(*family)
    name = f'{names_of(backbone)[-1]}.ffn.layers.1.weight'
    with torch.no_grad():
        backbone.get_parameter(name)[0, 0] = bad
    with pytest.raises(QuantizationError, match=name.replace('.', r'\.')):
        calibrate(backbone, names_of(backbone), inputs(), MinMax())
    assert all(
        quantizer.params is None for quantizer in quantizers_of(backbone).values()
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused(family, dtype):
    backbone = quantizable(*family).to(dtype)
    first = next(name for name, _ in backbone.named_parameters())
    with pytest.raises(
        QuantizationError,
        match=rf'^{first} is in {dtype}; calibrate in float32'.replace(
            'torch.', ''
        ).replace('.', r'\.'),
    ):
        calibrate(backbone, names_of(backbone), inputs(), MinMax())
    backbone = quantizable(*family)
    backbone.get_submodule(names_of(backbone)[1]).to(dtype)
    with pytest.raises(
        QuantizationError, match=names_of(backbone)[1].replace('.', r'\.')
    ):
        calibrate(backbone, names_of(backbone), inputs(), MinMax())


@pytest.mark.parametrize('shared', ['layer', 'weight'])
def test_blocks_that_share_a_layer_or_a_weight_are_refused(shared):
    module = Toy()
    module.first, module.second = (
        nn.Sequential(module.first),
        nn.Sequential(module.second),
    )
    if shared == 'layer':
        module.second[0] = module.first[0]
    else:
        module.second[0].weight = module.first[0].weight
    with pytest.raises(QuantizationError, match=r'first\.0 and second\.0 '):
        calibrate(
            module,
            ['first', 'second'],
            toy_calls(),
            MinMax(),
            on_calls=lambda block: pytest.fail('work was done'),
        )
    assert all(quantizer.params is None for quantizer in quantizers_of(module).values())


def test_a_layer_that_one_block_runs_twice_is_calibrated():
    module = Toy()
    module.first = nn.Sequential(module.first, nn.ReLU(), module.first)
    calibrate(module, ['first', 'second'], toy_calls(), MinMax())
    assert is_calibrated(module)


def test_an_image_that_is_not_finite_names_the_layer(family):
    backbone = quantizable(*family)
    calls = inputs()
    calls[1].args[0][0, 1, 5, 5] = float('nan')
    with pytest.raises(
        QuantizationError,
        match=r'patch_embed\.projection receives activations that are NaN',
    ):
        calibrate(backbone, names_of(backbone), calls, MinMax())


def test_inference_mode_is_refused(family):
    backbone = quantizable(*family)
    with (
        torch.inference_mode(),
        pytest.raises(QuantizationError, match='inference_mode'),
    ):
        calibrate(backbone, names_of(backbone), inputs(), MinMax())


def test_an_empty_set_is_refused(family):
    backbone = quantizable(*family)
    with pytest.raises(QuantizationError, match='calibration set is empty'):
        calibrate(backbone, names_of(backbone), [], MinMax())


# What the next block sees.


@torch.no_grad()
def ordinary(backbone):
    """First arguments of every block in ordinary forwards."""
    seen = {name: [] for name in names_of(backbone)}
    handles = [
        backbone.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0])
        )
        for name in seen
    ]
    outputs(backbone)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize('method', [MinMax, AdaLog])
@pytest.mark.parametrize('propagate', [False, True])
def test_the_next_block_sees_float_or_quantized_outputs(family, propagate, method):
    seen = {}

    def look(block):
        seen[block.name] = [
            [call.args[0].clone() for call in calls]
            for calls in (block.calls, block.float_calls)
        ]

    backbone, _ = calibrated(
        *family, made(method, propagate_error=propagate), RECIPES[method], on_calls=look
    )
    quantized, plain = ordinary(backbone), ordinary(quantizable(*family))
    for number, (name, (calls, float_calls)) in enumerate(seen.items()):
        as_quantized, as_float = (
            all(torch.equal(*pair) for pair in zip(calls, reference[name], strict=True))
            for reference in (quantized, plain)
        )
        assert (as_quantized, as_float) == (
            (True, True) if number == 0 else (propagate, not propagate)
        ), name
        assert all(
            torch.equal(*pair) for pair in zip(float_calls, plain[name], strict=True)
        ), name


class Toy(nn.Module):
    """Two blocks of one layer each, with something between them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ('first', 'second'):
            op = QuantLinear.from_float(nn.Linear(16, 16))
            with torch.no_grad():
                op.weight.copy_(torch.randn(16, 16, generator=generator))
                op.bias.copy_(torch.randn(16, generator=generator))
            self.add_module(
                name,
                equip(
                    op, input=UniformQuantizer(4), weight=UniformQuantizer(4, axis=-2)
                ),
            )

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def toy_calls():
    return [
        Call((torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)),))
        for rows in (60, 45)
    ]


@pytest.mark.parametrize('propagate', [False, True])
@torch.no_grad()
def test_a_block_is_searched_on_quantized_or_float_inputs(propagate):
    """Its target is its float output on these inputs; what it hands on for the targets
    of others is the float model's.
    """
    module, plain, blocks = Toy(), Toy(), {}

    class Spy(AdaLog):
        def calibrate(self, block):
            super().calibrate(block)
            blocks[block.name] = (block, block.targets, block.grams())
            return True

    calibrate(
        module,
        ['first', 'second'],
        toy_calls(),
        Spy(**{**FAST, 'rows': 10**6}, propagate_error=propagate),
    )
    x = torch.cat([call.args[0] for call in toy_calls()])
    as_float, as_quantized = torch.relu(plain.first(x)), torch.relu(module.first(x))
    assert (as_float - as_quantized).abs().max() > 0.1
    block, outputs, grams = blocks['second']
    inputs = as_quantized if propagate else as_float
    torch.testing.assert_close(block.samples['second'][0][0], inputs)
    torch.testing.assert_close(torch.cat(outputs), plain.second(as_float))
    torch.testing.assert_close(
        torch.cat([call.args[0] for call in block.float_calls]), as_float
    )
    rounded = module.second.input_quantizer(inputs).double()
    part = grams['second'].objective(torch.eye(16)[None], 1)
    torch.testing.assert_close(
        part.root[0, 0].double(), rounded.T @ rounded, rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(
        part.linear()[0, 0].mT.double(),
        rounded.T @ (rounded - inputs.double()),
        rtol=1e-4,
        atol=1e-3,
    )
    first, outputs, _ = blocks['first']
    assert torch.equal(first.samples['first'][0][0], x) and torch.equal(
        torch.cat(outputs), plain.first(x)
    )


def test_propagated_errors_change_the_result(family):
    first, second = (
        calibrated(*family, AdaLog(**FAST, propagate_error=propagate))[0]
        for propagate in (False, True)
    )
    assert first.state_dict().keys() == second.state_dict().keys() and not equal(
        first, second
    )
    begin = names_of(first)[0]
    assert all(
        torch.equal(value, second.state_dict()[key])
        for key, value in first.state_dict().items()
        if key.startswith(begin + '.')
    )


# Signal to noise.


def test_sqnr_by_hand():
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    op = QuantLinear.from_float(nn.Linear(6, 4))
    equip(op, input=covering(x, 4), weight=covering(op.weight, 3, -2))
    x_q, w_q, w, b = (
        t.astype(np.float64)
        for t in (
            oracle_of(op.input_quantizer, x.numpy()),
            oracle_of(op.weight_quantizer, op.weight.detach().numpy()),
            op.weight.detach().numpy(),
            op.bias.detach().numpy(),
        )
    )
    target = x.double().numpy() @ w.T + b
    expected = 10 * math.log10(
        (target**2).sum() / ((x_q @ w_q.T + b - target) ** 2).sum()
    )
    assert sqnr_db(op, [(x[:10],), (x[10:],)]) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_sqnr_of_weighted_rows_is_that_of_the_rows_so_often():
    x, counts = (
        torch.randn(30, 6, generator=torch.Generator().manual_seed(0)),
        torch.arange(30) % 4,
    )
    x[::3] *= 5
    for op, rows in (
        (QuantLinear.from_float(nn.Linear(6, 4)), x),
        (QuantConv2d.from_float(nn.Conv2d(1, 4, (2, 3))), x.view(30, 1, 2, 3)),
    ):
        equip(op, input=covering(x, 4), weight=covering(op.weight, 3, op.weight_axis))
        expected = sqnr_db(op, [(rows.repeat_interleave(counts, 0),)])
        assert sqnr_db(op, [(rows,)], counts.float()) == pytest.approx(
            expected, rel=1e-4
        )
        assert sqnr_db(op, [(rows,)]) != pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_sqnr_is_against_the_float_weight_where_there_is_another_one():
    x, op = torch.randn(30, 6), equip(QuantLinear.from_float(nn.Linear(6, 4)))
    before, block = op.weight.clone(), Block('toy', op, [], {'fc': op})
    block.set_weight('fc', before + 0.1 * torch.randn(4, 6))
    changed, target = op(x), nn.functional.linear(x, before, op.bias)
    now = op.weight.clone()
    expected = 10 * math.log10(
        float(target.square().sum() / (changed - target).square().sum())
    )
    assert sqnr_db(op, [(x,)], None, block.as_float) == pytest.approx(
        expected, rel=1e-4
    ) and torch.equal(op.weight, now)


def test_sqnr_of_no_noise_is_none():
    op = equip(QuantLinear.from_float(nn.Linear(6, 4)))
    assert sqnr_db(op, [(torch.randn(5, 6),)]) is None


@pytest.mark.parametrize('high', [3, 2.2])
def test_sqnr_of_no_signal_is_none(high):
    """Products that cancel; with a range of [0, 2.2] quantized ones do not."""
    op = equip(QuantLinear.from_float(nn.Linear(2, 1)), input=uniform(0, high, 2))
    with torch.no_grad():
        op.weight.copy_(torch.tensor([[2, -1]]))
        op.bias.zero_()
    x = torch.tensor([[1.0, 2]])
    assert (op.quantized(x) == 0).item() == (high == 3)
    assert sqnr_db(op, [(x,)]) is None
