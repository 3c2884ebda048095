"""AdaLog against the table form in exact arithmetic, the equation in numpy, and its
properties.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mmptq.quantizers import AdaLogQuantizer
from mmptq.quantizers.adalog import Q_RANGE, decode_table

from ..conftest import adalog, adalog_codes, adalog_tables, adalog_values

BASES = (10, 18.5, 25, 37, 53, 100, 137)


def decoded(quantizer):
    """The values of all codes, the escape last."""
    return quantizer.decode(torch.arange(quantizer.levels + 1), **quantizer.params)


# The table form.


def test_tables_by_hand():
    shift, mantissa, largest = decode_table(torch.tensor(18.5), 16)
    assert largest == 30
    assert shift.tolist() == [k // 2 for k in range(16)]
    assert mantissa.tolist() == [30, 21] * 8  # 30 / sqrt 2 = 21.2
    shift, mantissa, _ = decode_table(torch.tensor(20.0), 4)
    assert shift.tolist() == [0, 0, 1, 1] and mantissa.tolist() == [
        6,
        4,
        6,
        4,
    ]  # 6 2^-(20/37) = 4.13, 6 2^-(3/37) = 5.67, ...23/37: 3.90


def test_searched_bases_are_those_of_the_paper():
    assert list(Q_RANGE) == list(range(10, 138))


@pytest.mark.parametrize('bits', range(2, 9))
def test_tables_are_exact(bits):
    for q in (*BASES, *(Q_RANGE if bits == 4 else ())):
        shift, mantissa, largest = decode_table(torch.tensor(float(q)), 2**bits)
        assert (shift.tolist(), mantissa.tolist(), largest) == adalog_tables(bits, q)


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('scale', [1.0, 0.7312, 113.7])
@pytest.mark.parametrize('bits', range(2, 9))
def test_decode_is_the_table_form_bit_for_bit(bits, scale, strict):
    for q in BASES:
        values = decoded(adalog(bits, q, scale, strict=strict)).numpy()
        assert values.dtype == np.float32 and np.array_equal(
            values, adalog_values(bits, q, scale, strict)
        )


def test_four_bit_mantissas_are_integers_from_15_to_30():
    for q in Q_RANGE:
        shift, mantissa, largest = decode_table(torch.tensor(float(q)), 16)
        assert (
            largest == 30
            and (mantissa == mantissa.round()).all()
            and mantissa.min() >= 15
            and mantissa.max() <= 30
        )
        values = decoded(adalog(4, q)).double()[:-1]
        assert torch.equal((values * 30 * torch.exp2(shift)).round(), mantissa)


@pytest.mark.parametrize(('q', 'base'), [(37, 2.0), (18.5, math.sqrt(2))])
def test_log2_and_log_sqrt2_are_two_of_its_bases(q, base):
    values = decoded(adalog(4, q, 0.8))
    assert values[-1] == 0
    np.testing.assert_allclose(
        values[:-1].numpy(),
        0.8 * base ** -np.arange(16.0),
        rtol=1e-6 if q == 37 else 1 / 60,
    )


# Codes and levels.


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_codes_equal_the_equation(bits, strict):
    generator = torch.Generator().manual_seed(bits)
    for q in BASES:
        x = (
            torch.exp2(-torch.rand(400, generator=generator) * 60) * 1.5
        )  # below 1e-15 too, where the paper clips
        codes, from_tie = adalog_codes(x.numpy(), q, bits, 0.9, strict)
        clear = from_tie > 1e-3
        assert clear.mean() > 0.9 and codes[clear].min() == 0
        quantizer = adalog(bits, q, 0.9, strict=strict)
        ours = quantizer.encode(x, **quantizer.params).numpy()
        assert np.array_equal(ours[clear], codes[clear])
        assert np.array_equal(
            quantizer(x).numpy(), adalog_values(bits, q, 0.9, strict)[ours]
        )


@pytest.mark.parametrize(('strict', 'levels'), [(False, 17), (True, 16)])
@pytest.mark.parametrize('q', [18.5, 37, 60])
def test_number_of_levels(q, strict, levels):
    x = torch.cat([torch.zeros(1), torch.exp2(torch.linspace(-40, 0, 5000))])
    found = adalog(4, q, strict=strict)(x).unique()
    assert len(found) == levels and found[0] == 0 and found[-1] == 1


@pytest.mark.parametrize(('strict', 'last'), [(False, 15), (True, 14)])
@pytest.mark.parametrize('q', BASES)
def test_what_lies_beyond_the_last_code_is_zero(q, strict, last):
    quantizer = adalog(4, q, 2.0, strict=strict)
    inside, beyond = (2 * 2 ** (-(last + part) * q / 37) for part in (0.49, 0.51))
    assert quantizer(torch.tensor([inside, beyond])).tolist() == [
        adalog_values(4, q, 2.0)[last],
        0,
    ]


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_nan_stays_nan_and_nothing_else_does(bits, strict):
    quantizer = adalog(bits, 30, 2.0, strict=strict)
    x = torch.tensor([[math.nan, 1.0], [0.0, math.nan], [math.inf, -math.inf]])
    codes, others = quantizer.encode(x, **quantizer.params), ~x.isnan()
    for values in (quantizer(x), quantizer.decode(codes, **quantizer.params)):
        assert torch.equal(values.isnan(), x.isnan()) and torch.equal(
            values[others], quantizer(x[others])
        )
    assert codes.dtype == torch.int16 and codes[others].max() == quantizer.zero_code


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        *[
            ('fixed_q', value)
            for value in (
                0,
                0.5,
                -37,
                1001,
                10**400,
                math.nan,
                math.inf,
                True,
                '37',
                [37],
            )
        ],
        *[
            ('fixed_scale', value)
            for value in (0, -1.0, 1e-42, 1e39, 10**400, math.nan, math.inf, True, '1')
        ],
        *[('strict', value) for value in (1, 0, None, 'yes')],
    ],
)
def test_options_that_make_no_sense_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        AdaLogQuantizer(4, **{option: value})


@pytest.mark.parametrize(
    'options',
    [
        dict(fixed_q=1),
        dict(fixed_q=1000),
        dict(fixed_scale=1.2e-38),
        dict(fixed_scale=3.4e38, strict=True),
    ],
)
def test_options_at_the_ends_are_usable(options):
    quantizer = AdaLogQuantizer(8, **options)
    quantizer.set(**quantizer.range_params(torch.tensor(0.0), torch.tensor(1.0)))
    assert torch.isfinite(quantizer(torch.rand(50))).all()


def test_values_outside_are_cut():
    quantizer = adalog(4, 30, 2.0)
    assert quantizer(torch.tensor([2.0, 2.5, 1e30, math.inf])).tolist() == [2] * 4
    assert quantizer(torch.tensor([-1e-20, -1.0, -math.inf])).tolist() == [0] * 3


def test_zero_is_the_code_beyond_all_values():
    """8 bits at the smallest base reach 2^-69, past the 1e-15 at which the paper clips,
    and zero stays zero all the same.
    """
    quantizer = adalog(8, 10, 0.5)
    assert (
        quantizer.zero_code == 256 and adalog(8, 10, 0.5, strict=True).zero_code == 255
    )
    assert (
        quantizer.encode(torch.zeros(1), **quantizer.params) == 256
        and decoded(quantizer)[255] == 0.5 * adalog_values(8, 10)[255] > 0
    )


# Properties.

cases = given(
    bits=st.integers(2, 8),
    q=st.one_of(st.integers(10, 137), st.just(18.5)),
    strict=st.booleans(),
    scale=st.floats(2**-10, 2**10, width=32),
    exponents=st.lists(st.floats(-60, 2, width=32), min_size=1, max_size=30),
)


def logarithmic_case(bits, q, strict, scale, exponents):
    """A quantizer, and values spread over and around its range."""
    return (
        adalog(bits, q, scale, strict=strict),
        (torch.tensor(exponents).sort().values.double().exp2() * scale).float(),
    )


@cases
def test_codes_are_within_range(bits, q, strict, scale, exponents):
    quantizer, x = logarithmic_case(bits, q, strict, scale, exponents)
    codes = quantizer.encode(
        torch.cat([x, -x, torch.tensor([0.0, math.inf, -math.inf])]), **quantizer.params
    )
    assert codes.min() >= 0 and codes.max() <= 2**bits - strict


@cases
def test_monotone(bits, q, strict, scale, exponents):
    quantizer, x = logarithmic_case(bits, q, strict, scale, exponents)
    assert (quantizer(x).diff() >= 0).all()


@cases
def test_idempotent(bits, q, strict, scale, exponents):
    assume((bits, q) != (2, 10))  # see the next test
    quantizer, x = logarithmic_case(bits, q, strict, scale, exponents)
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))


def test_two_bits_at_the_smallest_base_is_the_one_table_too_coarse_for_its_own_values():
    # 6 2^-(30/37) = 3.42 is rounded to 3 = 6 2^-1, whose code is round(37/10) = 4:
    # zero. In all others a value has its own code.
    values = adalog(2, 10)(torch.tensor([0.57]))
    assert values == 0.5 and adalog(2, 10)(values) == 0
    for bits in (2, 3, 4):
        for q in (*Q_RANGE, 18.5):
            values = adalog_values(bits, q)
            own = values[values > 0]
            assert np.array_equal(values[adalog_codes(own, q, bits)[0]], own) == (
                (bits, q) != (2, 10)
            )


@cases
def test_zero_stays_exactly_zero(bits, q, strict, scale, exponents):
    quantizer, x = logarithmic_case(bits, q, strict, scale, exponents)
    assert (quantizer(torch.zeros(3)) == 0).all() and (quantizer(-x) == 0).all()


@cases
def test_relative_error_is_bounded_by_the_base(bits, q, strict, scale, exponents):
    quantizer, x = logarithmic_case(bits, q, strict, scale, exponents)
    smallest = 2.0 ** (-(2**bits - strict - 0.5) * q / 37)
    inside = x[(x.double() > scale * smallest * (1 + 1e-4)) & (x <= scale)].double()
    ratio = quantizer(inside.float()).double() / inside
    # Half a step of the base, and half a unit of a mantissa that is at least G/2.
    step, mantissa = 2.0 ** (q / 74), Fraction(1, 2 * 2**bits - 2)
    assert (ratio <= step * (1 + mantissa) * (1 + 1e-4)).all() and (
        ratio >= (1 - mantissa) / step * (1 - 1e-4)
    ).all()


# Ranges and grids.


@pytest.mark.parametrize(
    ('low', 'high', 'options', 'scale', 'q'),
    [
        (0, 3, {}, 3, 37),
        (-5, 3, {}, 3, 37),
        (0, 3, dict(fixed_scale=1.0), 1, 37),
        (0, 3, dict(fixed_q=18.5), 3, 18.5),
        (0, 0, {}, 1, 37),
        (-3, -2, {}, 1, 37),
        (0, 1e-42, {}, 1, 37),
    ],
)
def test_ranges_by_hand(low, high, options, scale, q):
    params = AdaLogQuantizer(4, **options).range_params(
        torch.tensor(float(low)), torch.tensor(float(high))
    )
    assert params['scale'].item() == pytest.approx(scale) and params['q'].item() == q


def softmax_rows():
    return (
        torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
        .mul(3)
        .softmax(-1)
    )


def gelu_rows():
    """Shifted GELU, as it is quantized."""
    return (
        torch.nn.functional.gelu(
            torch.randn(1, 3000, generator=torch.Generator().manual_seed(2))
        )
        + 0.16997124
    )


@pytest.mark.parametrize(
    ('count', 'bases'),
    [
        (128, range(10, 138)),
        (200, range(10, 138)),
        (64, range(11, 138, 2)),
        (16, range(13, 138, 8)),
    ],
)
@pytest.mark.parametrize('options', [{}, dict(fixed_scale=1.0)], ids=str)
def test_the_first_grid_is_all_bases_at_one_scale(count, bases, options):
    """Or every second, or eighth, log2 among them."""
    values = gelu_rows()
    grid = AdaLogQuantizer(4, **options).candidates(values, count)
    assert (
        grid.params['q'].tolist() == [[q] for q in bases]
        and grid.stage == 0
        and 37 in bases
    )
    assert (
        grid.params['scale'] == (1 if options else values.max())
    ).all() and grid.params['scale'].shape == (len(bases), 1)


def test_the_first_grid_has_the_present_scale():
    present = {'scale': torch.tensor([0.3]), 'q': torch.tensor([12.0])}
    grid = AdaLogQuantizer(4).candidates(gelu_rows(), 128, present)
    assert (grid.params['scale'] == 0.3).all() and grid.params[
        'q'
    ].flatten().tolist() == list(Q_RANGE)


def test_a_fixed_base_is_the_only_one():
    quantizer, values = AdaLogQuantizer(4, fixed_q=18.5), gelu_rows()
    grid = quantizer.candidates(values, 128)
    assert grid.params['q'].tolist() == [[18.5]]
    grid = quantizer.refine(
        grid, torch.zeros(1, 1, dtype=torch.float64), values, 128, 16
    )
    assert (grid.params['q'] == 18.5).all() and len(
        grid.params['scale'].unique()
    ) == 128


def errors_at(grid, chosen):
    """Errors by which the given members are the best, in this order."""
    errors = torch.full(grid.params['q'].shape, 100.0, dtype=torch.float64)
    for rank, number in enumerate(chosen):
        errors[number] = rank
    return errors


def test_the_second_grid_is_sixteen_bases_times_eight_scales():
    quantizer, values = AdaLogQuantizer(4), gelu_rows()
    first = quantizer.candidates(values, 128)
    best = [5, 120, 3, 77, 40, 41, 0, 127, 9, 90, 8, 60, 50, 12, 100, 13]
    second = quantizer.refine(first, errors_at(first, best), values, 128, 16)
    high = values.max().item()
    larger = values[values >= values.mean()].double().numpy()
    scales = np.linspace(np.quantile(larger, 0.9), high, 8)[::-1]
    assert (
        second.params['q'].flatten().tolist()
        == [10.0 + number for number in best for _ in range(8)]
        and second.stage == 1
    )
    np.testing.assert_allclose(
        second.params['scale'].view(16, 8).numpy(), np.tile(scales, (16, 1)), rtol=1e-5
    )
    np.testing.assert_allclose(second.spacing.item(), scales[0] - scales[1], rtol=1e-4)


def test_the_third_grid_is_four_scales_around_each_of_32_and_so_are_finer_ones():
    quantizer, values = AdaLogQuantizer(4), gelu_rows()
    first = quantizer.candidates(values, 128)
    second = quantizer.refine(first, errors_at(first, range(20, 36)), values, 128, 16)
    best = list(range(3, 128, 4))
    third = quantizer.refine(second, errors_at(second, best), values, 128, 16)
    centre = second.params['scale'][best].double().numpy()
    offsets = np.array([-1 / 2, -1 / 6, 1 / 6, 1 / 2]) * second.spacing.item()
    np.testing.assert_allclose(
        third.params['scale'].view(32, 4).numpy(), centre + offsets, rtol=1e-5
    )
    assert torch.equal(
        third.params['q'].view(32, 4), second.params['q'][best].expand(-1, 4)
    )
    np.testing.assert_allclose(
        third.spacing.item(), second.spacing.item() / 3.5, rtol=1e-5
    )
    fourth = quantizer.refine(third, errors_at(third, best), values, 128, 16)
    centre = third.params['scale'][best].double().numpy()
    np.testing.assert_allclose(
        fourth.params['scale'].view(32, 4).numpy(), centre + offsets / 3.5, rtol=1e-5
    )


def test_a_known_scale_is_not_refined():
    quantizer, values = AdaLogQuantizer(4, fixed_scale=1.0), softmax_rows()
    grid = quantizer.candidates(values, 128)
    assert quantizer.refine(grid, errors_at(grid, []), values, 128, 16) is None


@pytest.mark.parametrize('width', [2, 4, 16, 200])
@pytest.mark.parametrize('count', [2, 16, 128])
def test_grids_of_any_size_hold_the_best_so_far(count, width):
    """Its base with scales around its own, or all of the range."""
    quantizer, values = AdaLogQuantizer(3), gelu_rows()
    grid = quantizer.candidates(values, count)
    for _ in range(2):
        best = len(grid.params['q']) // 2
        finer = quantizer.refine(grid, errors_at(grid, [best]), values, count, width)
        near = finer.params['scale'][finer.params['q'] == grid.params['q'][best]]
        assert (
            near.min() <= grid.params['scale'][best] * 1.00001
            and near.max() >= grid.params['scale'][best] * 0.99999
        )
        assert (finer.params['scale'] > 0).all() and torch.isfinite(
            finer.params['scale']
        ).all()
        grid = finer


def test_a_width_of_one():
    quantizer, values = AdaLogQuantizer(4), gelu_rows()
    grid = quantizer.candidates(values, 128)
    assert (
        quantizer.refine(grid, errors_at(grid, [7]), values, 128, 1).params['q'] == 17
    ).all()


CONSTANT = [
    {},
    dict(fixed_scale=1.0),
    dict(fixed_q=18.5),
    dict(fixed_scale=1.0, fixed_q=37),
]


@pytest.mark.parametrize('value', [0.0, -2.0, 0.25, 1e-42])
@pytest.mark.parametrize('options', CONSTANT, ids=str)
def test_grids_of_constant_values_are_usable(value, options):
    x = torch.full((1, 60), value)
    quantizer = AdaLogQuantizer(4, **options)
    grid = quantizer.candidates(x, 64)
    for _ in range(6):
        assert (
            torch.isfinite(grid.params['scale']).all()
            and (grid.params['scale'] > 0).all()
            and (grid.params['q'] > 0).all()
        )
        quantizer.set(scale=grid.params['scale'][0, 0], q=grid.params['q'][0, 0])
        assert torch.isfinite(quantizer(x)).all()
        grid = quantizer.refine(grid, errors_at(grid, []), x, 64, 8) or grid


def test_grids_of_constant_values_whose_mean_is_rounded_up():
    constants = (
        torch.full((1, 6144), value) for value in torch.linspace(0.5, 1, 100).tolist()
    )
    x = next(x for x in constants if x.mean() > x.max())
    quantizer = AdaLogQuantizer(4)
    grid = quantizer.candidates(x, 128)
    assert (
        quantizer.refine(grid, errors_at(grid, []), x, 128, 16).params['scale']
        == x.max()
    ).all()
