"""AdaLog: what its adaptive base is for, and inputs at the edge."""

import numpy as np
import pytest
import torch
from torch import nn

from mmptq.backbones import find_spec
from mmptq.calibration import Block, Call, calibrate, operations, search
from mmptq.checkpoints.reading import is_calibrated
from mmptq.layers import GeluShift, QuantLinear, QuantMatMul, Rescale
from mmptq.methods import AdaLog, MinMax
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer

from ..conftest import (
    FAST,
    equip,
    image,
    oracle_of,
    outputs_of,
    plan,
    quantizable,
    rescaled,
)


def attention(seed, windows=6, heads=2, length=49):
    """Probabilities as Swin has them, a few peaks and a long tail, and values."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(windows, heads, length, length, generator=generator) * 2.5
    return scores.softmax(-1), torch.randn(
        windows, heads, length, 8, generator=generator
    )


PV = {
    'adalog': lambda: AdaLogQuantizer(4, fixed_scale=1.0),
    'log2': lambda: AdaLogQuantizer(4, fixed_scale=1.0, fixed_q=37),
    'logsqrt2': lambda: AdaLogQuantizer(4, fixed_scale=1.0, fixed_q=18.5),
    'uniform': lambda: UniformQuantizer(4),
}


EVERYTHING = dict(rows=10**6, screen=10**6)


def pv_error(left, method=None):
    """Squared error of probabilities times values, in numpy, with a quantizer for the
    probabilities; the quantizer.
    """
    op = equip(QuantMatMul(), left=PV[left](), right=UniformQuantizer(8, axis=-3))
    calls = [Call(attention(seed)) for seed in (1, 2)]
    outputs_of((method or AdaLog(**EVERYTHING)), Block('pv', op, calls, {'pv': op}))
    error = 0
    for call in calls:
        p, v = (x.double().numpy() for x in call.args)
        p_q, v_q = (
            oracle_of(quantizer, x)
            for quantizer, x in zip(op.quantizers().values(), (p, v), strict=True)
        )
        error += ((p_q.astype(float) @ v_q.astype(float) - p @ v) ** 2).sum()
    return error, op.left_quantizer


def test_the_adaptive_base_beats_fixed_bases_and_uniform():
    errors = {name: pv_error(name)[0] for name in PV}
    assert errors['adalog'] < 0.98 * min(
        errors['log2'], errors['logsqrt2'], errors['uniform']
    )
    assert errors['uniform'] < 0.98 * pv_error('uniform', MinMax())[0]
    quantizer = pv_error('adalog')[1]
    assert 10 < quantizer.q < 37 and quantizer.q != 18.5 and quantizer.scale == 1


def test_fixed_bases_stay_fixed():
    assert pv_error('log2')[1].q == 37 and pv_error('logsqrt2')[1].q == 18.5


def test_more_candidates_are_better():
    few, many = (
        pv_error('adalog', AdaLog(candidates=count, steps=2, rows=10**6))[0]
        for count in (4, 128)
    )
    assert many < 0.95 * few


def test_more_rounds_are_not_worse_on_their_samples():
    errors = [
        pv_error('adalog', AdaLog(rounds=rounds, rows=10**6))[0] for rounds in (1, 2, 4)
    ]
    assert errors[0] * (1 + 1e-6) >= errors[1] and errors[1] * (1 + 1e-6) >= errors[2]


def test_linear_layers_search_weight_and_input():
    torch.manual_seed(0)
    x = torch.randn(200, 16) ** 3
    errors = {}
    for name, method in (
        ('minmax', MinMax()),
        ('one', AdaLog(**EVERYTHING, rounds=1)),
        ('three', AdaLog(**EVERYTHING)),
    ):
        torch.manual_seed(1)
        op = equip(
            QuantLinear.from_float(nn.Linear(16, 6)),
            input=UniformQuantizer(4),
            weight=UniformQuantizer(4, axis=-2),
        )
        with torch.no_grad():
            op.weight.copy_(torch.randn(6, 16) ** 3)
            target = op(x)
            outputs = outputs_of(
                method, Block('layer', op, [Call((x,))], {'layer': op})
            )
            errors[name] = (op(x) - target).square().sum().item()
        assert torch.equal(outputs[0], target)
    assert (
        errors['three'] <= errors['one'] * (1 + 1e-6)
        and errors['one'] < 0.9 * errors['minmax']
    )


def all_finite(backbone, call):
    with torch.no_grad():
        return all(bool(torch.isfinite(out).all()) for out in backbone(*call.args))


def calibrated(family, x):
    backbone = quantizable(*family)
    results = calibrate(
        backbone,
        find_spec(backbone).block_names(backbone),
        [Call((x,))],
        AdaLog(**FAST),
    )
    assert is_calibrated(backbone)
    return backbone, results


def test_one_image_is_enough(family):
    backbone, results = calibrated(family, image(45, 57))
    assert all_finite(backbone, Call((image(50, 40, seed=9),)))
    assert all(value > 3 for result in results for value in result.sqnr_db.values())


@pytest.mark.parametrize(
    'zero', [slice(1, 2), slice(0, 3)], ids=['one channel', 'all channels']
)
def test_images_with_channels_of_zeros(family, zero):
    x = image(45, 57)
    x[:, zero] = 0
    backbone, _ = calibrated(family, x)
    assert all_finite(backbone, Call((x,))) and all_finite(
        backbone, Call((image(45, 57),))
    )


@pytest.mark.parametrize('rescale', [None, Rescale])
def test_an_activation_channel_of_zeros_stays_zero(rescale):
    torch.manual_seed(0)
    x = torch.randn(100, 8)
    x[:, 3] = 0
    op = rescaled(nn.Linear(8, 4))
    op.rescale = rescale and rescale()
    equip(op, input=UniformQuantizer(4), weight=UniformQuantizer(4, axis=-2))
    nn.init.zeros_(op.weight[2])
    outputs_of(AdaLog(**FAST), Block('layer', op, [Call((x,))], {'layer': op}))
    inputs, weight = op.operands(x)
    assert (
        (inputs[:, 3] == 0).all()
        and (op.input_quantizer(inputs)[:, 3] == 0).all()
        and (op.weight_quantizer(weight)[2] == 0).all()
    )
    if rescale:
        assert op.rescale.scale[3] == 1 and op.rescale.shift[3] == 0


@pytest.mark.parametrize('left', PV)
def test_rows_with_a_single_non_zero_are_exact(left):
    """A window whose tokens attend to one other each: the product picks rows of the
    values.
    """
    length = 16
    p = torch.eye(length).flip(0).expand(3, 2, -1, -1)
    v = torch.randn(3, 2, length, 4, generator=torch.Generator().manual_seed(0))
    op = equip(QuantMatMul(), left=PV[left](), right=UniformQuantizer(8, axis=-3))
    outputs_of(AdaLog(), Block('pv', op, [Call((p, v))], {'pv': op}))
    assert torch.isfinite(op(p, v)).all()
    precision = (
        0.01 if left == 'uniform' else 1e-6
    )  # a scale is searched, not known to be 1
    torch.testing.assert_close(
        op(p, v), op.right_quantizer(v).flip(-2), rtol=precision, atol=precision
    )


def test_masked_tokens_keep_no_weight():
    """Probabilities of exactly zero, as behind a mask of -100 or -inf."""
    p, v = attention(3)
    p = torch.where(torch.arange(49) < 30, p, 0)
    v = torch.where(torch.arange(49)[:, None] < 30, v, 1e6)
    op = equip(QuantMatMul(), left=AdaLogQuantizer(4, fixed_scale=1.0))
    outputs_of(AdaLog(), Block('pv', op, [Call((p, v))], {'pv': op}))
    assert (op.left_quantizer(p)[..., 30:] == 0).all()


def test_post_gelu_is_covered_from_its_minimum():
    torch.manual_seed(0)
    x = nn.functional.gelu(torch.randn(500, 12) * 2)
    op = rescaled(nn.Linear(12, 6))
    op.rescale = GeluShift()
    equip(op, input=AdaLogQuantizer(4), weight=UniformQuantizer(8, axis=-2))
    outputs_of(AdaLog(rows=10**6), Block('fc2', op, [Call((x,))], {'fc2': op}))
    shift = op.rescale.shift
    assert shift == np.float32(0.16997124254703522)
    assert (
        np.quantile(x.numpy(), 0.9) < op.input_quantizer.scale - shift <= x.max() + 1e-5
    )
    rounded = op.input_quantizer(op.rescale(x)) - shift
    uniform = UniformQuantizer(4)
    uniform.set(**uniform.range_params(x.min(), x.max()))
    assert (rounded - x).square().mean() < 2 * (uniform(x) - x).square().mean() and (
        rounded >= -0.17
    ).all()
    near_zero = x.abs() < 0.1
    assert near_zero.any() and ((rounded - x).abs()[near_zero] < 0.15).all()


@torch.no_grad()
def test_the_reparameterisation_after_a_norm_is_worth_it():
    """Channels of very different range: with one range for all of them and four bits
    most are lost.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=generator) * torch.exp(
        1.5 * torch.randn(16, generator=generator)
    )
    layer, errors = nn.Linear(16, 8), {}
    layer.weight.div_(x.std(0))  # each channel matters
    for rescale in (None, Rescale):
        op = rescaled(layer)
        op.rescale = rescale and rescale()
        equip(op, input=UniformQuantizer(4), weight=UniformQuantizer(8, axis=-2))
        outputs_of(AdaLog(rows=10**6), Block('qkv', op, [Call((x,))], {'qkv': op}))
        errors[rescale] = (op(x) - layer(x)).square().sum()
    assert errors[Rescale] < 0.1 * errors[None]


@torch.no_grad()
def test_the_shift_after_gelu_is_worth_it():
    """Without it all that is negative becomes zero."""
    x = nn.functional.gelu(
        torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    )
    layer, errors = nn.Linear(16, 8), {}
    for rescale in (None, GeluShift):
        op = rescaled(layer)
        op.rescale = rescale and rescale()
        equip(op, input=AdaLogQuantizer(6), weight=UniformQuantizer(8, axis=-2))
        outputs_of(AdaLog(rows=10**6), Block('fc2', op, [Call((x,))], {'fc2': op}))
        errors[rescale] = (op(x) - layer(x)).square().sum()
    assert errors[GeluShift] < 0.5 * errors[None]


@torch.no_grad()
def test_the_weight_is_searched_over_all_tokens():
    """A sample of a few rows decides about the input only."""
    torch.manual_seed(0)
    x = torch.randn(4000, 16) @ torch.randn(16, 16)
    layer = nn.Linear(16, 8)
    op = equip(
        QuantLinear.from_float(layer),
        input=UniformQuantizer(6),
        weight=UniformQuantizer(3, axis=-2),
    )
    block = Block('layer', op, [Call((x[:2000],)), Call((x[2000:],))], {'layer': op})
    outputs_of(AdaLog(rows=16), block)
    error = (op(x) - layer(x)).square().sum()
    errors = []
    for samples, weights in (
        ([(x,)], None),
        (block.samples['layer'], block.counts['layer']),
    ):
        op.weight_quantizer.clear()
        search(op, 'weight', samples, plan(screen=10**6), weights)
        errors.append((op(x) - layer(x)).square().sum())
    assert error < 1.01 * errors[0] < 0.9 * errors[1]


def test_operations_of_a_block_are_searched_on_float_inputs(family):
    """An operation's samples do not depend on how the others were quantized."""
    backbone = quantizable(*family)
    name = find_spec(backbone).block_names(backbone)[1]
    unit = backbone.get_submodule(name)
    seen = []
    handle = unit.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(Call(args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        backbone(image(45, 57))
    handle.remove()
    before, after = (
        Block(name, unit, seen, operations(unit)),
        Block(name, unit, seen, operations(unit)),
    )
    outputs = before.observe(32)
    again = outputs_of(AdaLog(**{**FAST, 'rows': 32}), after)
    assert torch.equal(outputs[0], again[0]) and not torch.equal(
        before.run()[0], outputs[0]
    )
    assert all(
        torch.equal(x, y)
        for key in before.samples
        for a, b in zip(before.samples[key], after.samples[key], strict=True)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize('all_tokens', [False, True])
def test_weights_are_chosen_on_all_tokens_or_on_the_sample(all_tokens, monkeypatch):
    summed = []
    monkeypatch.setattr(
        Block,
        'grams',
        lambda block, grams=Block.grams: summed.append(block.name) or grams(block),
    )
    op = equip(
        QuantLinear.from_float(nn.Linear(6, 4)),
        input=UniformQuantizer(4),
        weight=UniformQuantizer(4, axis=-2),
    )
    calls = [
        Call((torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(seed)),))
        for seed in range(3)
    ]
    outputs_of(
        AdaLog(**FAST, all_tokens=all_tokens), Block('layer', op, calls, {'layer': op})
    )
    assert summed == ['layer'] * all_tokens and op.weight_quantizer.params is not None


@pytest.mark.parametrize(
    'changes, searched',
    [
        ([True] * 6, ['left', 'right'] * 3),
        (
            [True, True, False],
            ['left', 'right', 'left', 'left', 'right'],
        ),  # the left one stays, so the right one would find what it found
        ([True, False], ['left', 'right', 'left', 'right']),
    ],
)
def test_what_cannot_change_is_not_searched_between_the_first_and_the_last_round(
    changes, searched, monkeypatch
):
    roles, answers = [], iter(changes + [True] * 6)
    monkeypatch.setattr(
        'mmptq.methods.adalog.search',
        lambda op, role, *_: roles.append(role) or next(answers),
    )
    op = equip(QuantMatMul(), left=UniformQuantizer(4), right=UniformQuantizer(4))
    outputs_of(AdaLog(), Block('qk', op, [Call(attention(0))], {'qk': op}))
    assert roles == searched


def test_a_search_tells_whether_it_found_something_else():
    op = equip(QuantMatMul(), left=UniformQuantizer(4), right=UniformQuantizer(4))
    assert search(op, 'left', [attention(0)], plan()) and not search(
        op, 'left', [attention(0)], plan()
    )
    assert search(op, 'left', [attention(1)], plan())
