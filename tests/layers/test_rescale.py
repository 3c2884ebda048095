"""Rescaled inputs: the function stays, on padded windows of a real Swin too, where
folding into the norm changes it.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.brute_force import search_reparam
from mmptq.calibration import Block, Call, calibrate, fpcs, operations
from mmptq.calibration.channels import Channels
from mmptq.layers import (
    GeluShift,
    QuantLinear,
    Rescale,
    largest_rescale,
    per_channel_rescale,
)
from mmptq.layers.rescale import GELU_MINIMUM, SMALLEST
from mmptq.methods import AdaLog
from mmptq.quantizers import UniformQuantizer

from ..conftest import (
    FAST,
    adalog,
    build_in,
    covering,
    equip,
    image,
    oracle_adalog,
    oracle_of,
    oracle_uniform,
    outputs_of,
    plan,
    quantizable,
    randomized,
    rescaled,
)

# The equations.


def oracle_rescale(scale, zero_point):
    """r and b, methods.md: S = mean s, Z = round(mean z), r = s / S, b = lo / r - LO
    with lo = -z s, LO = -Z S.
    """
    scale, zero_point = (
        np.asarray(scale, np.float64),
        np.asarray(zero_point, np.float64),
    )
    mean_scale, mean_zero = scale.mean(), np.rint(zero_point.mean())
    r = scale / mean_scale
    return r, -zero_point * scale / r + mean_zero * mean_scale, mean_scale, mean_zero


def test_by_hand():
    params = {
        'scale': torch.tensor([0.1, 0.2, 0.6]),
        'zero_point': torch.tensor([2, 5, 9], dtype=torch.int32),
    }
    r, b = per_channel_rescale(params, torch.zeros(3, dtype=torch.bool))
    np.testing.assert_allclose(
        r.numpy(), [1 / 3, 2 / 3, 2], rtol=1e-6
    )  # S = 0.3, Z = round(16/3) = 5
    np.testing.assert_allclose(b.numpy(), [0.9, 0, -1.2], atol=1e-6)  # (Z - z) S


channels = given(
    scale=st.lists(st.floats(2**-10, 4, width=32), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)


@channels
def test_r_and_b_are_those_of_the_equation(scale, seed):
    zero_point = np.random.default_rng(seed).integers(0, 16, len(scale))
    zero = torch.zeros(len(scale), dtype=torch.bool)
    r, b = per_channel_rescale(
        {
            'scale': torch.tensor(scale),
            'zero_point': torch.from_numpy(zero_point).int(),
        },
        zero,
    )
    expected = oracle_rescale(np.float32(scale), zero_point)
    np.testing.assert_allclose(r.numpy(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(
        b.numpy(), expected[1], rtol=1e-4, atol=1e-4 * expected[2]
    )


@channels
def test_one_quantizer_per_tensor_then_rounds_each_channel_by_its_own(scale, seed):
    """U(x / r - b; S, Z) has the codes of U(x; s, z), and the weight undoes the rest."""
    generator = torch.Generator().manual_seed(seed)
    count = len(scale)
    zero_point = torch.randint(0, 16, (count,), generator=generator).int()
    r, b = per_channel_rescale(
        {'scale': torch.tensor(scale), 'zero_point': zero_point},
        torch.zeros(count, dtype=torch.bool),
    )
    mean_scale, mean_zero = oracle_rescale(np.float32(scale), zero_point.numpy())[2:]
    codes = torch.randint(0, 16, (30, count), generator=generator) - zero_point
    x = (
        codes + 0.9 * torch.rand(30, count, generator=generator) - 0.45
    ) * torch.tensor(scale)  # clear of where rounding changes
    op = rescaled(nn.Linear(count, 4))
    op.rescale = Rescale()
    op.rescale.set(scale=r, shift=b)
    quantizer = UniformQuantizer(4)
    quantizer.set(
        scale=torch.tensor(mean_scale, dtype=torch.float32),
        zero_point=torch.tensor(int(mean_zero), dtype=torch.int32),
    )
    equip(op, input=quantizer)
    x_q = oracle_uniform(x.numpy(), np.float32(scale), zero_point.numpy(), 4).astype(
        np.float64
    )
    expected = (
        x_q @ op.weight.detach().double().numpy().T + op.bias.detach().double().numpy()
    )
    np.testing.assert_allclose(
        op(x).detach().numpy(),
        expected,
        rtol=1e-4,
        atol=1e-4 * np.abs(x_q).max() + 1e-6,
    )


def test_channels_that_are_always_zero_do_not_count():
    params = {
        'scale': torch.tensor([0.1, 1.0, 0.2, 0.6]),
        'zero_point': torch.tensor([2, 0, 5, 9], dtype=torch.int32),
    }
    zero = torch.tensor([False, True, False, False])
    r, b = per_channel_rescale(params, zero)
    np.testing.assert_allclose(r.numpy(), [1 / 3, 1, 2 / 3, 2], rtol=1e-6)
    np.testing.assert_allclose(b.numpy(), [0.9, 0, 0, -1.2], atol=1e-6)
    r, b = per_channel_rescale(params, torch.ones(4, dtype=torch.bool))
    assert r.tolist() == [1] * 4 and b.tolist() == [0] * 4


def test_r_is_not_so_small_that_it_blows_up_what_calibration_did_not_see():
    params = {
        'scale': torch.tensor([1e-12, 1.0, 1.0]),
        'zero_point': torch.tensor([5, 5, 5], dtype=torch.int32),
    }
    r, b = per_channel_rescale(params, torch.zeros(3, dtype=torch.bool))
    assert r[0] == pytest.approx(SMALLEST) and torch.isfinite(b).all()


# NormQuant: some of the difference between channels is left to the weight.

ALPHAS = (0.05, 0.1, 0.25, 0.5, 1.0)


def oracle_normquant(scale, zero_point, alpha, columns):
    """r and b, methods.md: r = (s / S)^(1 - alpha) / w^alpha, b = lo / r - LO, with w
    the columns' scales over their mean.
    """
    scale, zero_point, columns = (
        np.asarray(x, np.float64) for x in (scale, zero_point, columns)
    )
    mean_scale, mean_zero = scale.mean(), np.rint(zero_point.mean())
    r = (scale / mean_scale) ** (1 - alpha) / (columns / columns.mean()) ** alpha
    return r, -zero_point * scale / r + mean_zero * mean_scale


def oracle_largest(largest, alpha, columns):
    """r, methods.md: C = mean c, c <- max(c, C), r = max(1, (c / C)^(1 - alpha) /
    w^alpha).
    """
    largest, columns = np.asarray(largest, np.float64), np.asarray(columns, np.float64)
    ratio = np.maximum(largest, largest.mean()) / largest.mean()
    return np.maximum(1, ratio ** (1 - alpha) / (columns / columns.mean()) ** alpha)


def ranges(count, seed=0):
    """Of channels, and the scales of the weight's columns."""
    generator = torch.Generator().manual_seed(seed)
    scale, columns = (
        torch.exp(torch.randn(count, generator=generator)) for _ in range(2)
    )
    return {
        'scale': scale,
        'zero_point': torch.randint(0, 16, (count,), generator=generator).int(),
    }, columns


def none(count):
    return torch.zeros(count, dtype=torch.bool)


def test_normquant_by_hand():
    params = {
        'scale': torch.tensor([0.1, 0.9, 0.2]),
        'zero_point': torch.tensor([2, 5, 8], dtype=torch.int32),
    }
    r, b = per_channel_rescale(
        params, none(3), 0.5, torch.tensor([2.0, 8, 2])
    )  # S = 0.4, Z = 5, w = 1/2, 2, 1/2
    expected = np.array([(0.25 / 0.5) ** 0.5, (2.25 / 2) ** 0.5, (0.5 / 0.5) ** 0.5])
    np.testing.assert_allclose(r.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(
        b.numpy(), np.array([-0.2, -4.5, -1.6]) / expected + 2, rtol=1e-5
    )


@channels
def test_r_and_b_of_normquant_are_those_of_the_equation(scale, seed):
    rng = np.random.default_rng(seed)
    zero_point, columns = (
        rng.integers(0, 16, len(scale)),
        np.float32(rng.uniform(0.01, 4, len(scale))),
    )
    for alpha in ALPHAS:
        r, b = per_channel_rescale(
            {
                'scale': torch.tensor(scale),
                'zero_point': torch.from_numpy(zero_point).int(),
            },
            none(len(scale)),
            alpha,
            torch.from_numpy(columns),
        )
        expected = oracle_normquant(np.float32(scale), zero_point, alpha, columns)
        np.testing.assert_allclose(r.numpy(), expected[0], rtol=1e-5)
        np.testing.assert_allclose(
            b.numpy(),
            expected[1],
            rtol=1e-4,
            atol=1e-5 * (np.abs(expected[1]).max() + 16 * np.mean(scale)),
        )


@channels
def test_without_alpha_the_weight_has_no_say(scale, seed):
    params = {
        'scale': torch.tensor(scale),
        'zero_point': torch.randint(0, 16, (len(scale),)).int(),
    }
    zero = torch.rand(len(scale), generator=torch.Generator().manual_seed(seed)) < 0.2
    expected = per_channel_rescale(params, zero)
    for options in (
        (0.0, torch.rand(len(scale))),
        (0, torch.zeros(len(scale))),
        (0.0, None),
        (0.3, None),
    ):
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(
                per_channel_rescale(params, zero, *options), expected, strict=True
            )
        )


def test_the_scale_of_the_columns_does_not_matter():
    params, columns = ranges(9)
    for alpha in ALPHAS:
        for other in (8 * columns, columns / 1024):
            ours, theirs = (
                (
                    *per_channel_rescale(params, none(9), alpha, each),
                    largest_rescale(params['scale'], alpha, each),
                )
                for each in (other, columns)
            )
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('alpha', [0, *ALPHAS])
def test_channels_that_are_always_zero_keep_their_scale(alpha):
    params, columns = ranges(9)
    zero = torch.tensor([False, True, False, False, True, False, False, False, False])
    r, b = per_channel_rescale(params, zero, alpha, columns)
    assert (r[zero] == 1).all() and (b[zero].abs() <= 1e-6).all()
    s, z, w = (x.double().numpy() for x in (*params.values(), columns))
    mean_scale, mean_zero = s[~zero].mean(), np.rint(z[~zero].mean())
    expected = (s / mean_scale) ** (1 - alpha) / (w / w.mean()) ** alpha
    np.testing.assert_allclose(r.numpy()[~zero], expected[~zero], rtol=1e-5)
    np.testing.assert_allclose(
        b.numpy()[~zero],
        (-z * s / expected + mean_zero * mean_scale)[~zero],
        rtol=1e-4,
        atol=1e-5,
    )
    r, b = per_channel_rescale(params, torch.ones(9, dtype=torch.bool), alpha, columns)
    assert (r == 1).all() and (b == 0).all()


@pytest.mark.parametrize('alpha', [0, *ALPHAS])
@pytest.mark.parametrize(
    'columns',
    [
        [0.0, 1, 2],
        [0.0, 0, 1],
        [0.0, 0, 0],
        [1e-38, 1, 1],
        [1e-42, 1e-42, 0],
        [1, 1, 1e6],
    ],
    ids=str,
)
def test_r_is_usable_whatever_the_channels_and_the_weight(columns, alpha):
    columns = torch.tensor(columns)
    for scale in ([1.0, 1, 1], [1e-12, 1, 1], [1e-30, 1e-30, 1e-30], [1e6, 1, 1e-6]):
        params = {
            'scale': torch.tensor(scale),
            'zero_point': torch.tensor([0, 15, 7], dtype=torch.int32),
        }
        for result in (
            *per_channel_rescale(params, none(3), alpha, columns),
            largest_rescale(params['scale'], alpha, columns),
        ):
            assert torch.isfinite(result).all()
        assert (per_channel_rescale(params, none(3), alpha, columns)[0] > 0).all()


def test_the_largest_by_hand():
    largest, columns = (
        torch.tensor([1.0, 3, 8]),
        torch.tensor([1.0, 2, 3]),
    )  # C = 4, w = 1/2, 1, 3/2
    assert largest_rescale(largest, 0, columns).tolist() == [1, 1, 2]
    assert largest_rescale(largest, 0.5, columns).tolist() == pytest.approx(
        [2**0.5, 1, (4 / 3) ** 0.5]
    )
    assert largest_rescale(largest, 1, columns).tolist() == [2, 1, 1]


@given(
    largest=st.lists(st.floats(2**-10, 100, width=32), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_r_of_the_largest_is_that_of_the_equation(largest, seed):
    columns = np.float32(np.random.default_rng(seed).uniform(0.01, 4, len(largest)))
    for alpha in (0, *ALPHAS):
        r = largest_rescale(torch.tensor(largest), alpha, torch.from_numpy(columns))
        np.testing.assert_allclose(
            r.numpy(), oracle_largest(np.float32(largest), alpha, columns), rtol=1e-5
        )
        assert (r >= 1).all()


@pytest.mark.parametrize('alpha', [0, *ALPHAS])
def test_where_weights_are_alike_only_channels_above_the_average_change(alpha):
    largest = torch.tensor([1.0, 2, 9, 0, 3])
    r = largest_rescale(largest, alpha, torch.full((5,), 0.3))
    assert r[[0, 1, 3, 4]].tolist() == pytest.approx([1] * 4, abs=1e-6) and r[
        2
    ] == pytest.approx(3 ** (1 - alpha))


@pytest.mark.parametrize('alpha', [0, *ALPHAS])
def test_the_largest_of_inputs_of_zeros(alpha):
    assert (
        largest_rescale(torch.zeros(4), alpha, torch.tensor([1.0, 2, 0.1, 0])).tolist()
        == [1] * 4
    )
    largest = torch.tensor([0.0, 1, 2, 3])
    r = largest_rescale(largest, alpha, torch.tensor([1e-3, 1, 1, 1]))
    assert r[0] == 1 and torch.isfinite(r).all()


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('alpha', [0, *ALPHAS])
def test_normquant_preserves_the_function(alpha, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(9, 5, bias), torch.randn(2, 40, 9)
    params, columns = ranges(9)
    r = largest_rescale(params['scale'], alpha, columns)
    for scale, shift in (
        per_channel_rescale(params, none(9), alpha, columns),
        (r, torch.zeros(9)),
        (r, torch.randn(9)),
    ):
        op = equip(rescaled(layer, Rescale))
        op.rescale.set(scale=scale, shift=shift)
        assert not torch.allclose(op.rescale(x), x, atol=0.1)
        assert (op(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()


# The layer.


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(9,), (40, 9), (2, 5, 4, 9)])
@pytest.mark.parametrize('cls', [Rescale, GeluShift])
@pytest.mark.parametrize('seed', range(3))
def test_the_function_stays(cls, shape, bias, seed):
    torch.manual_seed(seed)
    layer, x = nn.Linear(9, 5, bias), torch.randn(shape) * 3
    op = equip(rescaled(layer, cls, seed))
    expected = layer(x)
    assert not torch.allclose(op.rescale(x), x, atol=0.1)
    assert (op(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (
        torch.equal(op.float_forward(x), expected)
        and op.weight is layer.weight
        and op.bias is layer.bias
    )


@pytest.mark.parametrize('bias', [True, False])
def test_the_rescaled_layer_is_the_formula(bias):
    """x' = x / r - b, W' = W diag(r), bias' = bias + W' b; then x' and W' are
    quantized, and the bias is not.
    """
    op = rescaled(nn.Linear(9, 5, bias), Rescale)
    x = torch.randn(30, 9, generator=torch.Generator().manual_seed(1))
    r, b = (value.double().numpy() for value in (op.rescale.scale, op.rescale.shift))
    weight = op.weight.detach().double().numpy()
    x_new, w_new = x.double().numpy() / r - b, weight * r
    equip(
        op,
        input=covering(torch.from_numpy(x_new).float(), 4),
        weight=covering(torch.from_numpy(w_new).float(), 5, -2),
    )
    x_q, w_q = (
        oracle_of(quantizer, value).astype(np.float64)
        for quantizer, value in zip(
            op.quantizers().values(), (x_new, w_new), strict=True
        )
    )
    expected = (
        x_q @ w_q.T + w_new @ b + (op.bias.detach().double().numpy() if bias else 0)
    )
    np.testing.assert_allclose(op(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert (
        np.abs(
            expected
            - x.double().numpy() @ weight.T
            - (op.bias.detach().numpy() if bias else 0)
        ).max()
        > 0.1
    )


@pytest.mark.parametrize('bias', [True, False])
def test_the_shift_after_gelu_is_taken_back_by_the_quantized_weight(bias):
    """decode(x + c) W_q + (bias - c W_q 1) is (decode(x + c) - c) W_q + bias."""
    op = rescaled(nn.Linear(9, 5, bias), GeluShift)
    x = nn.functional.gelu(
        torch.randn(30, 9, generator=torch.Generator().manual_seed(1)) * 2
    )
    equip(op, input=adalog(4, 20, 3.0), weight=covering(op.weight, 3, -2))
    decoded = oracle_adalog(x.double().numpy() + GELU_MINIMUM, 20, 4, scale=3.0).astype(
        np.float64
    )
    w_q = oracle_of(op.weight_quantizer, op.weight.detach().numpy()).astype(np.float64)
    expected = (decoded - GELU_MINIMUM) @ w_q.T + (
        op.bias.detach().double().numpy() if bias else 0
    )
    np.testing.assert_allclose(op(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        op(torch.full((9,), -GELU_MINIMUM)).detach().numpy(),
        -GELU_MINIMUM * w_q.sum(1) + (op.bias.detach().numpy() if bias else 0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_shift_is_the_minimum_of_gelu():
    x = torch.linspace(-1, -0.5, 100001, dtype=torch.float64)
    assert (
        -GELU_MINIMUM < nn.functional.gelu(x).min().item() < -GELU_MINIMUM + 1e-7
        and GELU_MINIMUM == 0.16997124254703522
    )


def test_parameters_of_a_rescale_have_a_value_for_each_channel():
    op = rescaled(nn.Linear(9, 5), Rescale)
    assert set(op.state_dict()) == {'weight', 'bias', 'rescale.scale', 'rescale.shift'}
    assert op.rescale.scale.shape == op.rescale.shift.shape == (9,)
    with pytest.raises(ValueError, match='scale is not positive'):
        op.rescale.set(scale=torch.zeros(9), shift=torch.zeros(9))


# What a method makes of activations.


def after_norm(rows=200, seed=0):
    """As after a LayerNorm: channels of very different width and place, one constant,
    one zero, one nearly constant.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator) * torch.exp(
        torch.randn(8, generator=generator)
    ) + torch.randn(8, generator=generator)
    x[:, 2], x[:, 5], x[:, 6] = 0.7, 0, -0.3 + 1e-6 * x[:, 6]
    return x


def found(x, bits=4, **options):
    """A float layer as AdaLog reparameterises it for its input, in two calls of
    different size.
    """
    op = rescaled(nn.Linear(x.shape[1], 5))
    op.rescale = Rescale()
    equip(op, input=UniformQuantizer(bits), weight=UniformQuantizer(bits, axis=-2))
    outputs_of(
        AdaLog(**{**FAST, **options}),
        Block('layer', op, [Call((x[:50],)), Call((x[None, 50:],))], {'layer': op}),
    )
    for quantizer in op.quantizers().values():
        quantizer.clear()
    return op


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_reparameterisation_is_finite_and_leaves_zero_channels(bits):
    x = after_norm()
    op = found(x, bits)
    r, b = op.rescale.scale, op.rescale.shift
    assert (
        torch.isfinite(r).all()
        and torch.isfinite(b).all()
        and (r >= SMALLEST * 0.999).all()
    )
    assert r[5] == 1 and b[5] == 0 and (op.rescale(x)[:, 5] == 0).all()
    assert (op(x) - op.float_forward(x)).abs().max() <= 1e-5 * op.float_forward(
        x
    ).abs().max()


@pytest.mark.parametrize('value', [0.0, 3.0, -2.0])
def test_reparameterisation_of_constant_activations(value):
    op = found(torch.full((60, 8), value))
    assert (
        torch.isfinite(op.rescale.scale).all()
        and torch.isfinite(op.rescale.shift).all()
    )
    x = torch.randn(4, 8)
    assert (op(x) - op.float_forward(x)).abs().max() < 1e-4
    if value == 0:
        assert (op.rescale.scale == 1).all() and (op.rescale.shift == 0).all()


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_reparameterisation_is_that_of_the_literal_reference(bits):
    """Which scores every candidate of each channel's range on the channel itself. To 4
    bits all zero points are tried by both.

    The channels hold zero between their values, since the reference's ranges are too
    narrow for others.
    """
    x = after_norm()
    x[:, 2] += torch.randn(
        200, generator=torch.Generator().manual_seed(1)
    )  # constants are ties
    x[:, 6] = x[:, 0] ** 3
    assert (x.amin(0) <= 0).all() and (x.amax(0) >= 0).all()
    op = found(x, bits, steps=6, width=16, candidates=128, rows=10**4)
    r, b = search_reparam(x, bits)
    np.testing.assert_allclose(op.rescale.scale.numpy(), r.numpy(), rtol=2e-4)
    np.testing.assert_allclose(
        op.rescale.shift.numpy(), b.numpy(), rtol=1e-4, atol=1e-4
    )


# What is kept of each channel, where there are more tokens than that.


def test_few_tokens_are_kept_whole():
    x = after_norm(90)
    channels = Channels(2, 400, 0)
    channels.add(x[:30].view(5, 6, 8))
    channels.add(x[30:])
    screen = channels.screen()
    assert torch.equal(screen.values.flatten(1), x.t()) and torch.equal(
        channels.spread(), x.t()
    )
    assert channels.zero().tolist() == [False] * 5 + [True] + [False] * 2


def test_of_many_tokens_the_extremes_are_kept_and_the_rest_is_weighted():
    x = after_norm(5000)
    channels = Channels(2, 400, 0)
    channels.add(x[:2000])
    channels.add(x[2000:])
    values = channels.screen().values.flatten(1)
    assert (
        values.shape[1] <= 400
        and torch.equal(values.amin(1), x.amin(0))
        and torch.equal(values.amax(1), x.amax(0))
    )
    assert channels.zero().tolist() == [False] * 5 + [True] + [False] * 2
    quantizer = UniformQuantizer(4)
    params = quantizer.candidates(x.t(), 128).params
    estimate = channels.screen().errors(quantizer, params)
    exact = torch.stack(
        [
            (quantizer.rounder(x.t()[:, None, None])(**params)[:, 0, number, 0] - x.t())
            .double()
            .square()
            .sum(1)
            for number in range(128)
        ]
    )
    varied = [0, 1, 3, 4, 7]
    ratio = (estimate / exact)[:, varied]
    assert (ratio - 1).abs().mean() < 0.15 and abs(ratio.mean() - 1) < 0.05


def test_the_spread_of_many_tokens_is_theirs():
    """Extremes and quantiles, which decide a grid, are nearly those of all tokens,
    though tails are kept whole.
    """
    x = torch.randn(
        20000, 4, generator=torch.Generator().manual_seed(0)
    ) * torch.tensor([1.0, 5, 0.1, 0]) + torch.tensor([0.0, 3, -1, 0])
    channels = Channels(2, 1024, 0)
    channels.add(x[:8000])
    channels.add(x[8000:].view(30, 400, 4))
    spread = channels.spread()
    assert (
        torch.equal(spread.amin(1), x.amin(0))
        and torch.equal(spread.amax(1), x.amax(0))
        and spread.shape[1] <= 1024
    )
    fractions = torch.tensor([0.1, 0.5, 0.9])
    assert (
        (torch.quantile(spread, fractions, 1) - torch.quantile(x, fractions, 0)).abs()
        <= 0.25 * x.std(0)
    ).all()


def test_a_channel_that_is_zero_but_once_is_not_zero():
    x = torch.zeros(3000, 3)
    x[1234, 1], x[777, 2] = 1e-3, -1e-3
    channels = Channels(1, 100, 0)
    channels.add(x)
    assert channels.zero().tolist() == [True, False, False]


@pytest.mark.parametrize('kind', ['gaussian', 'heavy'])
@pytest.mark.parametrize('bits', [3, 4, 6])
def test_ranges_from_what_is_kept_are_nearly_those_of_all_tokens(bits, kind):
    generator = torch.Generator().manual_seed(bits)
    calls = [torch.randn(2000, 3, generator=generator) for _ in range(32)]
    if kind == 'heavy':
        calls = [
            x * torch.exp(0.7 * torch.randn(x.shape, generator=generator))
            for x in calls
        ]
    everything = torch.cat(calls).t()
    kept, whole = Channels(32, 1024, 0), Channels(32, 10**7, 0)
    for x in calls:
        kept.add(x)
        whole.add(x)
    errors = []
    for channels in (kept, whole):
        screens = [channels.screen()]
        params = fpcs(
            UniformQuantizer(bits), channels.spread(), screens, [screens], plan()
        )
        scale, zero_point = (value[:, None] for value in params.values())
        rounded = UniformQuantizer(bits, axis=-2).fake_quantize(
            everything, scale, zero_point
        )
        errors.append((rounded - everything).double().square().sum(1))
    assert (errors[0] / errors[1]).mean() <= 1.05


# A real Swin, whose windows are padded after the norm.

THIN = dict(
    type='SwinTransformer',
    embed_dims=12,
    depths=(2, 2, 2, 2),
    num_heads=(1, 2, 4, 8),
    window_size=7,
    mlp_ratio=2,
    out_indices=(0, 1, 2, 3),
    drop_path_rate=0.1,
)


def random_rescales(backbone):
    """r and b of every linear after a norm, by name."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: (
            torch.exp(0.5 * torch.randn(op.in_features, generator=generator)),
            torch.randn(op.in_features, generator=generator),
        )
        for name, op in operations(backbone).items()
        if isinstance(op, QuantLinear) and op.sites['input'] == 'post_norm'
    }


def folded(backbone, rescales):
    """As the official codes do: r and b in the norm, the weight and the bias of a float
    backbone.
    """
    backbone = copy.deepcopy(backbone)
    with torch.no_grad():
        for name, (r, b) in rescales.items():
            block = backbone.get_submodule(
                name.rsplit('.downsample.', 1)[0]
                .rsplit('.attn.', 1)[0]
                .rsplit('.ffn.', 1)[0]
            )
            norm = (
                block.downsample.norm
                if '.downsample.' in name
                else block.norm1
                if '.attn.' in name
                else block.norm2
            )
            linear = backbone.get_submodule(name)
            norm.weight.div_(r)
            norm.bias.div_(r).sub_(b)
            linear.weight.mul_(r)
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight @ b)
            else:
                linear.bias.add_(linear.weight @ b)
    return backbone


@pytest.fixture(scope='module')
def swins():
    """A float Swin, the rescaled one, and the one with everything folded into its
    norms.
    """
    plain, ours = randomized(build_in('mmdet', THIN)), quantizable('mmdet', THIN)
    ours.load_state_dict(plain.state_dict())
    rescales = random_rescales(ours)
    assert len(rescales) == 2 * 8 + 3
    for name, (r, b) in rescales.items():
        ours.get_submodule(name).rescale.set(scale=r, shift=b)
    return plain, ours, folded(plain, rescales)


@torch.no_grad()
def difference(backbone, reference, x):
    """Largest difference of each output, relative to its largest value."""
    return [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(backbone(x), reference(x), strict=True)
    ]


@pytest.mark.parametrize('size', [(800, 1216), (509, 333), (100, 75)], ids=str)
def test_padded_windows_are_rescaled_as_they_are(swins, size):
    plain, ours, official = swins
    x = image(*size)
    assert max(difference(ours, plain, x)) <= 1e-5
    assert max(difference(official, plain, x)) > 1e-3


def test_where_nothing_is_padded_folding_is_the_same(swins):
    plain, ours, official = swins
    x = image(224, 224)
    assert (
        max(difference(ours, plain, x)) <= 1e-5
        and max(difference(official, plain, x)) <= 1e-5
    )


@pytest.fixture(scope='module')
def normquant(swins):
    """The Swin with NormQuant at every linear layer: with shift after a norm, without
    it elsewhere.
    """
    backbone = quantizable('mmdet', THIN)
    backbone.load_state_dict(swins[0].state_dict())
    for seed, op in enumerate(
        op for op in operations(backbone).values() if isinstance(op, QuantLinear)
    ):
        params, columns = (
            ranges(op.in_features, seed)[0],
            op.weight.detach().abs().amax(0),
        )
        scale, shift = (
            largest_rescale(params['scale'], 0.5, columns),
            torch.zeros(op.in_features),
        )
        if op.sites['input'] == 'post_norm':
            scale, shift = per_channel_rescale(
                params, none(op.in_features), 0.25, columns
            )
        op.rescale = Rescale()
        op.rescale.set(scale=scale, shift=shift)
    return backbone


@pytest.mark.parametrize('size', [(509, 333), (100, 75), (224, 224)], ids=str)
def test_normquant_preserves_the_function_of_padded_windows(swins, normquant, size):
    x = image(*size)
    assert max(difference(normquant, swins[0], x)) <= 1e-5


def test_calibrated_rescales_preserve_the_function_at_other_sizes(swins):
    """As AdaLog sets them, from images of another size than those that are tested."""
    plain = swins[0]
    backbone = quantizable('mmdet', THIN)
    backbone.load_state_dict(plain.state_dict())
    names = [
        'patch_embed',
        *(
            f'stages.{stage}.{part}'
            for stage in range(4)
            for part in ('blocks.0', 'blocks.1', *(['downsample'] if stage < 3 else []))
        ),
    ]
    calibrate(backbone, names, [Call((image(96, 130),))], AdaLog(**FAST))
    for op in operations(backbone).values():
        for quantizer in op.quantizers().values():
            quantizer.clear()
    assert (
        sum(
            op.rescale is not None and op.rescale.params is not None
            for op in operations(backbone).values()
            if isinstance(op, QuantLinear)
        )
        == 2 * 8 + 3 + 8
    )
    assert max(difference(backbone, plain, image(509, 333))) <= 1e-5
