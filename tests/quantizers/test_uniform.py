"""Uniform quantization against hand-computed numbers, the equation in numpy, and its
properties.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mmptq.quantizers import UniformQuantizer
from mmptq.quantizers.uniform import quantiles

from ..conftest import (
    covering,
    oracle_range,
    oracle_uniform,
    uniform,
    uniform_codes,
    uniform_values,
)


def test_by_hand():
    quantizer = UniformQuantizer(2)
    params = dict(
        scale=torch.tensor(0.5), zero_point=torch.tensor(1, dtype=torch.int32)
    )
    quantizer.set(**params)
    x = torch.tensor([-2, -0.5, -0.26, -0.24, 0, 0.24, 0.26, 0.9, 1.0, 7])
    assert quantizer.encode(x, **params).tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert quantizer(x).tolist() == [-0.5, -0.5, -0.5, 0, 0, 0, 0.5, 1, 1, 1]
    assert quantizer(torch.tensor([-0.25, 0.25, 0.75])).tolist() == [
        0,
        0,
        1,
    ]  # ties go to the even integer
    assert quantizer.levels == 4


def test_range_by_hand():
    quantizer = UniformQuantizer(4)
    for low, high, scale, zero_point in [
        (-1, 2, 0.2, 5),
        (-3, 12, 1, 3),
        (0, 15, 1, 0),
        (2, 15, 1, 0),
        (-15, -2, 1, 15),
        (-30, 0, 2, 15),
        (7.5, 7.5, 0.5, 0),
        (-7.5, -7.5, 0.5, 15),
        (0, 0, 1, 0),
    ]:
        params = quantizer.range_params(
            torch.tensor(float(low)), torch.tensor(float(high))
        )
        assert (
            params['scale'].item() == pytest.approx(scale, rel=1e-7)
            and params['zero_point'].item() == zero_point
        )
        assert (
            params['zero_point'].dtype == torch.int32
            and params['scale'].dtype == torch.float32
        )


def test_symmetric_ranges_by_hand():
    """As far below zero as above it, which is the code in the middle; the lowest code
    is left over.
    """
    quantizer = UniformQuantizer(4, symmetric=True)
    for low, high, scale in [(-1, 2, 2 / 7), (-14, 3, 2), (3, 7, 1), (0, 0, 1)]:
        params = quantizer.range_params(
            torch.tensor(float(low)), torch.tensor(float(high))
        )
        assert (
            params['scale'].item() == pytest.approx(scale, rel=1e-7)
            and params['zero_point'].item() == 8
        )
        assert params['zero_point'].dtype == torch.int32
    quantizer.set(**quantizer.range_params(torch.tensor(-14.0), torch.tensor(3.0)))
    assert quantizer(torch.tensor([-14.0, -30, 3, 14, 30])).tolist() == [
        -14,
        -16,
        4,
        14,
        14,
    ]
    assert (
        UniformQuantizer(2, symmetric=True).range_params(
            torch.tensor(-1.0), torch.tensor(3.0)
        )['scale']
        == 3
    )  # -3, 0 and 3
    with pytest.raises(ValueError, match='symmetric must be True or False, not 1'):
        UniformQuantizer(4, symmetric=1)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    axis=st.sampled_from([None, -2]),
)
def test_symmetric_integers_of_eight_bits_fit_int8(values, axis):
    x = torch.tensor([values])
    quantizer = UniformQuantizer(8, axis=axis, symmetric=True)
    grid = quantizer.candidates(x, 128)
    assert (
        (grid.params['zero_point'] == 128).all()
        and (grid.params['scale'] > 0).all()
        and len(grid.params['scale']) == 128
    )
    for column in (grid.params, quantizer.range_params(x.amin(1), x.amax(1))):
        codes = (
            quantizer.encode(
                x, scale=column['scale'][-1], zero_point=column['zero_point'][-1]
            ).to(torch.int32)
            - 128
        )
        assert codes.min() >= -127 and codes.max() <= 127


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize(
    ('shape', 'axis'),
    [((9, 40), None), ((6, 50), -2), ((6, 3, 5, 5), -4), ((2, 3, 11, 9), -3)],
)
def test_equals_the_equation(bits, shape, axis):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(shape, generator=generator)
    quantizer = covering(0.8 * x, bits, axis)  # some values are cut
    scale, zero_point = quantizer.scale.numpy(), quantizer.zero_point.numpy()
    codes, from_tie = uniform_codes(x.numpy(), scale, zero_point, bits)
    clear = from_tie > 1e-4
    assert clear.mean() > 0.98 and codes.min() == 0 and codes.max() == 2**bits - 1
    ours = quantizer.encode(x, **quantizer.params)
    assert np.array_equal(ours.numpy()[clear], codes[clear])
    assert np.array_equal(
        quantizer(x).numpy(), uniform_values(ours.numpy(), scale, zero_point)
    )


@pytest.mark.parametrize(
    ('shape', 'axis'), [((9, 40), None), ((6, 50), -2), ((2, 3, 11, 9), -3)]
)
def test_ranges_equal_the_equation(shape, axis):
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(5))
        + torch.linspace(-3, 3, shape[-2])[:, None]
    )
    quantizer = covering(x, 4, axis)
    others = tuple(d for d in range(-len(shape), 0) if d != axis)
    low, high = (
        f(x.numpy(), axis=None if axis is None else others, keepdims=axis is not None)
        for f in (np.amin, np.amax)
    )
    scale, zero_point = oracle_range(low, high, 4)
    np.testing.assert_allclose(
        quantizer.scale.numpy().ravel(), scale.ravel(), rtol=1e-6
    )
    assert np.array_equal(quantizer.zero_point.numpy().ravel(), zero_point.ravel())


finite = st.floats(-(2.0**100), 2.0**100, width=32).filter(
    lambda v: v == 0 or abs(v) > 2.0**-100
)
cases = given(
    bits=st.integers(2, 8),
    ends=st.tuples(finite, finite),
    places=st.lists(st.floats(-0.5, 1.5, width=32), min_size=1, max_size=30),
)


def quantized_case(bits, ends, places):
    """A quantizer for a range, and values that lie in and around it."""
    low, high = np.float32(min(ends)), np.float32(max(ends))
    x = low + np.array(places, np.float32) * (high - low)
    return uniform(low, high, bits), torch.from_numpy(np.sort(x.astype(np.float32)))


@cases
def test_idempotent(bits, ends, places):
    quantizer, x = quantized_case(bits, ends, places)
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))


@cases
def test_monotone(bits, ends, places):
    quantizer, x = quantized_case(bits, ends, places)
    assert (quantizer(x).diff() >= 0).all()


@cases
@example(bits=2, ends=(-1.0, 1.0), places=[0.0, 1.0])
def test_error_is_at_most_half_a_step_inside_the_range(bits, ends, places):
    quantizer, x = quantized_case(bits, ends, places)
    inside = x[(x >= min(*ends, 0)) & (x <= max(*ends, 0))].double()
    scale = quantizer.scale.double()
    assert (
        (quantizer(inside.float()).double() - inside).abs()
        <= 0.5 * scale + 1e-6 * (scale + inside.abs())
    ).all()


@cases
def test_zero_is_exact(bits, ends, places):
    quantizer, _ = quantized_case(bits, ends, places)
    assert (quantizer(torch.zeros(3)) == 0).all()


@given(
    bits=st.integers(2, 8),
    ends=st.tuples(finite, finite),
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1),
)
def test_codes_are_within_range_whatever_the_values(bits, ends, values):
    quantizer = uniform(min(ends), max(ends), bits)
    codes = quantizer.encode(torch.tensor(values), **quantizer.params)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1


@pytest.mark.parametrize(
    ('values', 'exact'),
    [(0.0, True), (5.0, True), (-5.0, True), (1e-30, True), (1e-42, False)],
)
def test_constant_inputs(values, exact):
    x = torch.full((4, 6), values)
    quantizer = covering(x, 4)
    assert quantizer.scale > 0 and torch.isfinite(quantizer.scale)
    torch.testing.assert_close(
        quantizer(x), x, rtol=1e-6 if exact else 0, atol=0 if exact else 1e-41
    )


def test_a_range_too_wide_for_its_dtype_is_not_set():
    with pytest.raises(ValueError, match='scale is not finite'):
        uniform(-3e38, 3e38)


# Grids.


def rows():
    """Three channels of different width, two of them not about zero."""
    values = torch.randn(
        3, 500, generator=torch.Generator().manual_seed(6)
    ) * torch.tensor([[1.0], [10], [0.1]])
    return values + torch.tensor([[0], [20], [-0.1]])


@pytest.mark.parametrize(
    ('bits', 'axis', 'count', 'zero_points', 'scales'),
    [
        (2, None, 128, 4, 32),
        (3, None, 128, 8, 16),
        (4, None, 128, 16, 8),
        (8, None, 128, 16, 8),
        (4, None, 16, 16, 2),
        (2, -2, 128, 2, 64),
        (3, -2, 128, 4, 32),
        (4, -2, 128, 8, 16),
        (5, -2, 128, 16, 8),
        (8, -2, 128, 16, 8),
        (4, -2, 1, 8, 2),
    ],
)
def test_the_first_grid_is_scales_times_zero_points(
    bits, axis, count, zero_points, scales
):
    """min(16, N) zero points per tensor, min(16, N/2) per channel or head; widths from
    between the 0.1 and 0.9 quantiles to all.
    """
    values = rows()[: 1 if axis is None else 3]
    grid = UniformQuantizer(bits, axis=axis).candidates(values, count)
    groups = len(values)
    assert grid.stage == 0 and grid.params['zero_point'].dtype == torch.int32
    scale, zero_point = (
        grid.params[name].view(scales, zero_points, groups)
        for name in ('scale', 'zero_point')
    )
    low, inner_low, inner_high, high = np.quantile(
        values.double().numpy(), (0, 0.1, 0.9, 1), axis=1
    )
    widest = np.maximum(high, 0) - np.minimum(low, 0)
    expected = np.linspace(inner_high - inner_low, widest, scales) / (2**bits - 1)
    np.testing.assert_allclose(
        scale.numpy(), np.broadcast_to(expected[:, None], scale.shape), rtol=1e-5
    )
    np.testing.assert_allclose(
        grid.spacing.numpy(), expected[1] - expected[0], rtol=1e-4
    )
    assert (zero_point == zero_point[:1]).all() and (
        zero_point[0].diff(dim=0) == 1
    ).all()
    assert zero_point.min() >= 0 and zero_point.max() <= 2**bits - 1
    if zero_points < 2**bits:  # in the middle, as far as codes go
        center = np.clip(
            oracle_range(low, high, bits)[1],
            zero_points // 2,
            2**bits - zero_points // 2,
        )
        assert np.array_equal(zero_point[0, 0].numpy(), center - zero_points // 2)


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('axis', [None, -2])
def test_the_first_grid_holds_the_range_of_all_values(bits, axis):
    quantizer = UniformQuantizer(bits, axis=axis)
    for values in rows()[:, None]:
        grid = quantizer.candidates(values, 128).params
        widest = quantizer.range_params(values.amin(1), values.amax(1))
        found = torch.isclose(grid['scale'], widest['scale'], rtol=1e-5) & (
            grid['zero_point'] == widest['zero_point']
        )
        assert found.sum() == 1


def test_each_row_has_its_own_grid():
    values = rows()
    quantizer, alone = UniformQuantizer(4, axis=-2), UniformQuantizer(4, axis=-2)
    grid, errors = (
        quantizer.candidates(values, 128),
        torch.rand(128, 3, generator=torch.Generator().manual_seed(1)).double(),
    )
    for row in range(3):
        mine = alone.candidates(values[row : row + 1], 128)
        finer, mine_finer = (
            quantizer.refine(grid, errors, values, 128, 16),
            alone.refine(mine, errors[:, row : row + 1], values, 128, 16),
        )
        for together, single in ((grid, mine), (finer, mine_finer)):
            assert all(
                torch.equal(value[:, row], single.params[name][:, 0])
                for name, value in together.params.items()
            )
            assert together.spacing[row] == single.spacing


def test_a_finer_grid_is_eight_scales_around_each_of_sixteen():
    quantizer, values = UniformQuantizer(4), rows()[:1]
    grid = quantizer.candidates(values, 128)
    errors = torch.arange(128.0).flip(0)[:, None].double()  # the last is the best
    for stage in range(1, 6):
        finer = quantizer.refine(grid, errors, values, 128, 16)
        best = grid.params['scale'].flip(0)[:16]
        offsets = torch.linspace(-0.5, 0.5, 8) * grid.spacing
        torch.testing.assert_close(
            finer.params['scale'].view(16, 8), best + offsets, rtol=1e-6, atol=0
        )
        assert torch.equal(
            finer.params['zero_point'].view(16, 8),
            grid.params['zero_point'].flip(0)[:16].expand(-1, 8),
        )
        np.testing.assert_allclose(
            finer.spacing.item(), grid.spacing.item() / 7.5, rtol=1e-6
        )
        assert finer.stage == stage
        grid = finer


def test_of_equal_errors_the_first_are_kept():
    quantizer, values = UniformQuantizer(4), rows()[:1]
    grid = quantizer.candidates(values, 128)
    finer = quantizer.refine(
        grid, torch.zeros(128, 1, dtype=torch.float64), values, 128, 16
    )
    assert (
        finer.params['zero_point'].flatten().tolist()
        == grid.params['zero_point'][:16].repeat_interleave(8).tolist()
    )


@pytest.mark.parametrize('values', [0.0, 3.0, -3.0, 1e-42])
@pytest.mark.parametrize('axis', [None, -2])
def test_grids_of_constant_values_hold_a_range_that_is_exact(values, axis):
    x = torch.full((1 if axis is None else 2, 50), values)
    quantizer = UniformQuantizer(4, axis=axis)
    grid = quantizer.candidates(x, 128)
    for step in range(6):
        scale, zero_point = grid.params['scale'], grid.params['zero_point']
        assert (
            torch.isfinite(scale).all()
            and (scale > 0).all()
            and zero_point.min() >= 0
            and zero_point.max() <= 15
        )
        errors = np.array(
            [
                [
                    abs(float(oracle_uniform(np.float32(values), *pair, 4)) - values)
                    for pair in zip(*group, strict=True)
                ]
                for group in zip(scale.numpy().T, zero_point.numpy().T, strict=True)
            ]
        ).T
        assert (
            errors.min(0)
            <= 1e-41 + abs(values) * (1e-6 if step == 0 else 0.08 / 7.5 ** (step - 1))
        ).all()
        grid = quantizer.refine(grid, torch.from_numpy(errors), x, 128, 16)


@given(
    values=st.lists(finite, min_size=1, max_size=20),
    bits=st.integers(2, 8),
    axis=st.sampled_from([None, -2]),
    width=st.integers(1, 20),
    count=st.integers(1, 140),
    seed=st.integers(0, 5),
)
def test_grids_are_usable_whatever_the_values(values, bits, axis, width, count, seed):
    x = torch.tensor([values]).clamp(-1e30, 1e30)
    quantizer = UniformQuantizer(bits, axis=axis)
    grid = quantizer.candidates(x, count)
    for _ in range(4):
        scale, zero_point = grid.params['scale'], grid.params['zero_point']
        assert (
            torch.isfinite(scale).all()
            and (scale > 0).all()
            and zero_point.min() >= 0
            and zero_point.max() < 2**bits
        )
        assert grid.spacing >= 0 and scale.shape == zero_point.shape
        errors = torch.rand(
            scale.shape, generator=torch.Generator().manual_seed(seed)
        ).double()
        grid = quantizer.refine(grid, errors, x, count, width)


def test_quantiles_of_long_rows_keep_the_extremes():
    values = torch.rand(2, 3 * 2**16, generator=torch.Generator().manual_seed(9))
    values[0, 1], values[1, 2] = 50, -50  # between the values that thinning keeps
    found = quantiles(values, (0, 0.1, 0.9, 1))
    assert found[0, 1] == -50 and found[3, 0] == 50
    np.testing.assert_allclose(found[1:3].numpy(), [[0.1, 0.1], [0.9, 0.9]], atol=0.01)


def test_quantiles_of_short_rows_are_those_of_numpy():
    values = torch.randn(3, 101, generator=torch.Generator().manual_seed(10))
    found = quantiles(values, (0, 0.1, 0.9, 1))
    np.testing.assert_allclose(
        found.numpy(), np.quantile(values.numpy(), (0, 0.1, 0.9, 1), axis=1), rtol=1e-5
    )
