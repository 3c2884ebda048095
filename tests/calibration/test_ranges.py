"""Percentile ranges against brute force in numpy, with weights and without."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmptq.calibration.ranges import PERCENTILES, least_error, tails
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer

from ..conftest import oracle_adalog, oracle_range, oracle_uniform

EXACT = [Fraction('0.999'), Fraction('0.9999'), Fraction('0.99999')]


def oracle_tail(values, p, weights=None):
    """The largest value with no more than 1 - p of the weight at or above those before
    it, one row.
    """
    order = np.argsort(-values, kind='stable')
    mass = np.cumsum(
        np.ones(len(values)) if weights is None else weights[order].astype(np.float64)
    )
    return values[
        order[min((mass <= float((1 - p) * Fraction(mass[-1]))).sum(), len(values) - 1)]
    ]


def brute_force(values, bits, weights=None):
    """Scale and zero point of each percentile pair for one row, and its squared error,
    best first.
    """
    found = []
    for p in EXACT:
        scale, zero_point = oracle_range(
            -oracle_tail(-values, p, weights), oracle_tail(values, p, weights), bits
        )
        error = (
            oracle_uniform(values, scale, zero_point, bits).astype(np.float64) - values
        ) ** 2
        found.append(
            (
                float((error * (1 if weights is None else weights)).sum()),
                float(scale),
                int(zero_point),
            )
        )
    return sorted(found)


def check(params, values, bits, weights=None):
    """That parameters are those of the best pair for each row; of pairs as good as the
    best any will do.
    """
    for row, scale, zero_point in zip(
        values.numpy(),
        params['scale'].tolist(),
        params['zero_point'].tolist(),
        strict=True,
    ):
        found = brute_force(row, bits, None if weights is None else weights.numpy())
        good = [one for one in found if one[0] <= found[0][0] * (1 + 1e-4)]
        assert any(
            scale == pytest.approx(one[1], rel=1e-6) and zero_point == one[2]
            for one in good
        )


def rows(size, seed=0):
    """Of Gaussian, heavy and one-sided values, with outliers, and uniform ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, size, generator=generator)
    x[1] = x[1] * torch.exp(x[1].abs())
    x[2] = x[2].abs() * 0.01
    x[3, ::997] *= 50
    x[4] = torch.rand(size, generator=generator) - 3
    x[5, 7] = -1e4
    return x


def counts(size, seed=0):
    """What each value counts: powers of two, so that sums are exact."""
    return torch.exp2(
        torch.randint(
            -3, 4, (size,), generator=torch.Generator().manual_seed(seed)
        ).float()
    )


# Percentiles.


def test_the_percentiles_are_those_of_the_paper():
    assert PERCENTILES == (0.999, 0.9999, 0.99999)


def test_tails_by_hand():
    values = torch.tensor([[3.0, 8, 1, 5, 7, 2, 4, 6], [0, 0, 0, 0, 0, 0, 0, -1]])
    assert tails(values, [0.75, 0.625, 0.999, 0.5, 0.6]).tolist() == [
        [6, 0],
        [5, 0],
        [8, 0],
        [4, 0],
        [5, 0],
    ]  # 2, 3, 0, 4, 3.2 before them


def test_the_largest_of_a_thousand_is_outside():
    values = torch.arange(1000.0)[None]
    assert tails(values, PERCENTILES).tolist() == [[998], [999], [999]]
    assert tails(values[:, 1:], PERCENTILES).tolist() == [[999]] * 3


def test_weighted_tails_by_hand():
    values, weights = (
        torch.tensor([[2.0, 5, 1, 4, 3], [1, 2, 3, 4, 5]]),
        torch.tensor([3.0, 1, 1, 1, 2]),
    )
    # 5 4 3 2 1 count 1 1 2 3 1 in the first row and 2 1 1 1 3 in the second; before a
    # value may be 1, 2, 4 and 1/2 of 8.
    assert tails(values, [0.875, 0.75, 0.5, 0.9375], weights).tolist() == [
        [4, 5],
        [3, 4],
        [2, 2],
        [5, 5],
    ]


def test_values_that_count_nothing_are_outside():
    values, weights = torch.tensor([[9.0, 3, 2, 8]]), torch.tensor([0.0, 1, 1, 0])
    assert (
        tails(values, PERCENTILES, weights).tolist() == [[3]] * 3
        and (-tails(-values, PERCENTILES, weights)).tolist() == [[2]] * 3
    )


@pytest.mark.parametrize('size', [1, 2, 17, 999, 1001, 20001, 100001])
def test_tails_equal_numpy(size):
    values, weights = rows(max(size, 8))[:, :size], counts(size)
    for given_weights in (None, weights, torch.ones(size)):
        ours = tails(values, PERCENTILES, given_weights).numpy()
        oracle = [
            [
                oracle_tail(
                    row, p, None if given_weights is None else given_weights.numpy()
                )
                for row in values.numpy()
            ]
            for p in EXACT
        ]
        assert np.array_equal(ours, oracle)


@pytest.mark.parametrize('many', [100, 5000, 90000])
def test_massive_values_that_count_little_may_fill_the_tail(many):
    """More of them than a first guess of the tail holds."""
    values = torch.randn(2, 100003, generator=torch.Generator().manual_seed(0))
    values[0, :many] += 100
    values[1, :100] += 100
    weights = torch.ones(100003)
    weights[:many] = 2.0**-26
    expected = [
        [oracle_tail(row, p, weights.numpy()) for row in values.numpy()] for p in EXACT
    ]
    ours = tails(values, PERCENTILES, weights)
    assert np.array_equal(ours.numpy(), expected) and (ours < 10).all()


# The pair of least error.


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('size', [60, 3001, 100001])
@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_least_error_is_that_of_brute_force(bits, size, weighted):
    values, weights = rows(size, bits), counts(size, bits) if weighted else None
    params = least_error(UniformQuantizer(bits, axis=-2), values, weights)
    assert {name: value.shape for name, value in params.items()} == {
        'scale': (6,),
        'zero_point': (6,),
    }
    assert params['zero_point'].dtype == torch.int32
    check(params, values, bits, weights)


def test_each_percentile_is_the_best_for_some():
    """So that the comparison above says something."""
    values = rows(100001)
    best = set()
    for bits in (2, 4, 8):
        for row in values.numpy():
            (least, scale, _), second, _ = brute_force(row, bits)
            if least < 0.99 * second[0]:
                best.add(
                    int(
                        np.argmin(
                            [
                                abs(
                                    oracle_range(
                                        -oracle_tail(-row, p), oracle_tail(row, p), bits
                                    )[0]
                                    - scale
                                )
                                for p in EXACT
                            ]
                        )
                    )
                )
    assert best == {0, 1, 2}


@given(
    values=st.lists(
        st.floats(-100, 100, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3),
        min_size=1,
        max_size=40,
    ),
    bits=st.integers(2, 8),
)
def test_of_few_values_all_are_inside(values, bits):
    x = torch.tensor([values])
    params, expected = (
        least_error(UniformQuantizer(bits), x),
        UniformQuantizer(bits).range_params(x.amin(1), x.amax(1)),
    )
    assert all(torch.equal(params[name], expected[name]) for name in expected)


@pytest.mark.parametrize('weighted', [False, True])
def test_groups_are_independent(weighted):
    values, weights = rows(3001), counts(3001) if weighted else None
    quantizer = UniformQuantizer(4, axis=-2)
    together = least_error(quantizer, values, weights)
    for index in range(6):
        alone = least_error(quantizer, values[index : index + 1], weights)
        assert all(
            torch.equal(alone[name][0], together[name][index]) for name in together
        )


def test_weights_are_repeated_values():
    values, times = (
        rows(3001),
        torch.randint(1, 5, (3001,), generator=torch.Generator().manual_seed(1)),
    )
    for bits in (2, 4, 8):
        weighted = least_error(UniformQuantizer(bits, axis=-2), values, times.float())
        repeated = least_error(
            UniformQuantizer(bits, axis=-2), values.repeat_interleave(times, 1)
        )
        assert all(torch.equal(weighted[name], repeated[name]) for name in repeated)
    for weights in (torch.ones(3001), torch.full((3001,), 0.125)):
        weighted = least_error(UniformQuantizer(4, axis=-2), values, weights)
        assert all(
            torch.equal(weighted[name], value)
            for name, value in least_error(UniformQuantizer(4, axis=-2), values).items()
        )


def test_the_order_of_values_does_not_matter():
    values, weights = rows(3001), counts(3001)
    order = torch.randperm(3001, generator=torch.Generator().manual_seed(2))
    params = least_error(UniformQuantizer(4, axis=-2), values, weights)
    shuffled = least_error(
        UniformQuantizer(4, axis=-2), values[:, order], weights[order]
    )
    assert all(torch.equal(params[name], shuffled[name]) for name in params)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('size', [1, 50, 5000])
@pytest.mark.parametrize('value', [0.0, 3.0, -2.0, 1e-42, 1e10])
def test_constant_values_are_usable(value, size, weighted):
    x = torch.full((2, size), value)
    params = least_error(
        UniformQuantizer(4, axis=-2), x, counts(size) if weighted else None
    )
    assert torch.isfinite(params['scale']).all() and (params['scale'] > 0).all()
    quantizer = UniformQuantizer(4, axis=-2)
    quantizer.set(**{name: quantizer.ungrouped(one) for name, one in params.items()})
    torch.testing.assert_close(quantizer(x), x, rtol=1e-6, atol=1e-41)
    assert (quantizer(torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize('others', [0.0, 1.0])
def test_a_single_value_that_is_not_constant(others):
    """A group that is constant but for less than the tails hold: the outlier is worth
    its error or not, but all is finite.
    """
    x = torch.full((2, 30001), others)
    x[0, 5], x[1, 6] = 1e3, -1e-3
    check(least_error(UniformQuantizer(4, axis=-2), x), x, 4)


def test_logarithmic_quantizers_have_ranges_too():
    values = rows(3001).abs()
    params = least_error(AdaLogQuantizer(4), values)
    for row, scale in zip(values.numpy(), params['scale'].numpy(), strict=True):
        scales = [oracle_tail(row, p) for p in EXACT]
        errors = [
            (
                (oracle_adalog(row, 37, 4, scale=float(one)).astype(np.float64) - row)
                ** 2
            ).sum()
            for one in scales
        ]
        assert scale in scales and errors[scales.index(scale)] <= min(errors) * (
            1 + 1e-4
        )
