"""What all quantizers share: identity, parameters, checkpoints, the fast way, the way
by codes and many at once.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmptq import QuantizationError
from mmptq.layers import GeluShift, QuantLinear, Rescale
from mmptq.quantizers import AdaLogQuantizer, Float, UniformQuantizer, calibrated_parts
from mmptq.quantizers.base import Grid, around, best_of

from ..conftest import (
    adalog,
    adalog_codes,
    adalog_values,
    covering,
    equip,
    rescaled,
    uniform,
)

CALIBRATED = {
    'uniform': lambda: uniform(-1.3, 2.1),
    'uniform heads': lambda: uniform([-1.0, -2.0, -0.1], [1.0, 0.0, 3.0], 6, -3),
    'adalog': lambda: adalog(4, 30, 1.7),
    'adalog strict': lambda: adalog(3, 53, strict=True),
    'adalog wide': lambda: adalog(5, 20, 200.0),
}
"""Quantizers that take tensors of (..., 3, rows, columns)."""

LAYOUTS = {
    'small': lambda: torch.randn(2, 3, 4, 5),
    'three dimensions': lambda: torch.randn(3, 4, 5),
    'empty': lambda: torch.randn(0, 3, 4, 5),
    'large': lambda: torch.randn(7, 3, 60, 60),
    'one large row': lambda: torch.randn(1, 3, 150, 150),
    'large first dimension': lambda: torch.randn(70001, 3, 1, 1),
    'five dimensions': lambda: torch.randn(5, 4, 3, 40, 40),
    'permuted': lambda: torch.randn(60, 3, 9, 70).permute(2, 1, 0, 3),
    'large in three dimensions': lambda: torch.randn(3, 200, 200),
    'sliced': lambda: torch.randn(9, 3, 120, 120)[::2, :, 1::2, :],
    'expanded': lambda: torch.randn(1, 3, 50, 50).expand(11, -1, -1, -1),
}


def by_codes(quantizer, x):
    return quantizer.decode(quantizer.encode(x, **quantizer.params), **quantizer.params)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', CALIBRATED)
def test_forward_is_decode_of_encode_bit_for_bit(name, layout):
    torch.manual_seed(1)
    quantizer, x = CALIBRATED[name](), LAYOUTS[layout]()
    before = x.clone()
    out = quantizer(x)
    codes = quantizer.encode(x, **quantizer.params)
    assert (
        out.shape == x.shape == codes.shape
        and out.dtype == torch.float32
        and codes.dtype == torch.int16
    )
    assert torch.equal(out, by_codes(quantizer, x))
    assert torch.equal(x, before)
    assert x.numel() == 0 or not torch.equal(out, x)


@pytest.mark.parametrize(
    ('shape', 'axis'),
    [
        ((300, 400), -2),
        ((60, 40, 8, 8), -4),
        ((5, 300, 90), -2),
        ((40, 2000), -1),
        ((3, 30000), -1),
    ],
)
def test_large_tensors_with_parameters_along_any_axis(shape, axis):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    quantizer = covering(x, 5, axis)
    assert torch.equal(quantizer(x), by_codes(quantizer, x))
    for index in (0, shape[axis] - 1):
        part = x.select(axis, index)
        alone = covering(part, 5)
        assert torch.equal(quantizer(x).select(axis, index), alone(part))


@pytest.mark.parametrize('layout', ['small', 'permuted'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', CALIBRATED)
def test_other_dtypes_are_kept(name, dtype, layout):
    """Activations under autocast are of half precision, parameters are not."""
    torch.manual_seed(1)
    quantizer, x = CALIBRATED[name](), LAYOUTS[layout]().to(dtype)
    out = quantizer(x)
    assert out.dtype == dtype
    same = (
        out.float() - quantizer(x.float())
    ).abs() <= 0.01 * out.float().abs() + 1e-3  # not where rounding tips over
    assert same.double().mean() > 0.9


def test_scalars():
    for quantizer in (uniform(-1, 1), adalog(4, 37)):
        x = torch.tensor(0.3)
        assert quantizer(x).shape == () and torch.equal(
            quantizer(x), quantizer(x[None])[0]
        )


# Many parameters at once.


def candidates(kind, number, groups, seed=0):
    """Random parameters (number, groups), and a quantizer for them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(number, groups, generator=generator) * 0.4 + 0.01
    if kind == 'uniform':
        return UniformQuantizer(4), {
            'scale': scale,
            'zero_point': (
                torch.randint(0, 16, (number, groups), generator=generator).int()
            ),
        }
    quantizer = AdaLogQuantizer(4, strict=kind == 'strict')
    return quantizer, {
        'scale': 4 * scale,
        'q': torch.randint(10, 138, (number, groups), generator=generator).float(),
    }


@pytest.mark.parametrize('shared', [False, True], ids=['by group', 'shared'])
@pytest.mark.parametrize(
    'shape', [(1, 1, 1, 1), (1, 1, 40, 5), (3, 1, 1, 30), (2, 4, 7, 6)], ids=str
)
@pytest.mark.parametrize('kind', ['uniform', 'adalog', 'strict'])
def test_many_at_once_are_each_by_itself(kind, shape, shared):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + (
        0 if kind == 'uniform' else 1
    )
    x[..., 0] = 0
    quantizer, params = candidates(kind, 9, 1 if shared else shape[0])
    before = x.clone()
    rounder = quantizer.rounder(x)
    rounder(**{name: value[:4] for name, value in params.items()}).fill_(
        5
    )  # whoever asked may change what he got
    many = rounder(**params)
    assert (
        many.shape == (shape[0], shape[1], 9, *shape[2:])
        and many.dtype == x.dtype
        and torch.equal(x, before)
    )
    for number in range(9):
        for group in range(shape[0]):
            one = {
                name: value[number, 0 if shared else group]
                for name, value in params.items()
            }
            expected = quantizer.fake_quantize(x[group], **one)
            found = many[group, :, number]
            if kind == 'uniform':
                assert torch.equal(found, expected)
            else:
                same_but_at_ties(found, expected, x[group], one, quantizer)


def same_but_at_ties(found, expected, x, params, quantizer):
    """Equal, or the next code's value where the logarithm lies between two codes."""
    scale, q = (float(params[name]) for name in ('scale', 'q'))
    codes, from_tie = adalog_codes(
        x.numpy(), q, quantizer.bits, scale, quantizer.strict
    )
    differ = found.numpy() != expected.numpy()
    assert (from_tie[differ] < 1e-4).all()
    values = adalog_values(quantizer.bits, q, scale, quantizer.strict)
    for value, code in zip(found.numpy()[differ], codes[differ], strict=True):
        assert value in values[max(0, code - 1) : code + 2]


@given(
    bits=st.integers(2, 8),
    strict=st.booleans(),
    count=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    exponents=st.lists(st.floats(-60, 4, width=32), min_size=1, max_size=20),
)
def test_many_bases_at_once_whatever_the_values(bits, strict, count, seed, exponents):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.rand(count, 1, generator=generator) * 20 - 10)
    q = torch.randint(10, 138, (count, 1), generator=generator).float()
    x = torch.cat(
        [torch.tensor(exponents).exp2(), torch.tensor([0.0, -1.0]), scale.flatten()]
    )[None, None, None]
    quantizer = AdaLogQuantizer(bits, strict=strict)
    many = quantizer.rounder(x)(scale=scale, q=q)
    for number in range(count):
        one = {'scale': scale[number, 0], 'q': q[number, 0]}
        same_but_at_ties(
            many[0, :, number],
            quantizer.fake_quantize(x[0], **one),
            x[0],
            one,
            quantizer,
        )
        assert (
            many[0, 0, number, 0, -count + number] == scale[number, 0]
        )  # the largest value is exact


@given(
    bits=st.integers(2, 8),
    count=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
)
def test_many_ranges_at_once_whatever_the_values(bits, count, seed, values):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.rand(count, 1, generator=generator) * 20 - 10)
    zero_point = torch.randint(
        0, 2**bits, (count, 1), generator=generator, dtype=torch.int32
    )
    quantizer, x = UniformQuantizer(bits), torch.tensor(values)[None, None, None]
    many = quantizer.rounder(x)(scale=scale, zero_point=zero_point)
    for number in range(count):
        one = {'scale': scale[number, 0], 'zero_point': zero_point[number, 0]}
        assert torch.equal(many[0, :, number], quantizer.fake_quantize(x[0], **one))


def test_the_best_of_a_grid_are_chosen_by_group():
    quantizer = UniformQuantizer(4, axis=-2)
    grid = quantizer.candidates(torch.randn(2, 50), 8)
    errors = torch.arange(32.0).view(16, 2).double()
    errors[:, 1] *= -1
    best = best_of(grid, errors, 3)
    for name, value in grid.params.items():
        assert torch.equal(
            best[name], torch.stack([value[[0, 1, 2], 0], value[[15, 14, 13], 1]], 1)
        )
    shared = Grid(
        {'scale': torch.arange(1.0, 17)[:, None]}, grid.spacing
    )  # the same for all groups
    assert best_of(shared, errors, 2)['scale'].tolist() == [[1, 16], [2, 15]]


def test_scales_around_others_are_positive():
    scales = around(torch.tensor([[1.0, 1.0], [0.1, 3.0]]), torch.tensor([0.6, 2.0]), 3)
    expected = [
        [0.7, 1],
        [1, 1],
        [1.3, 2],
        [0.1, 2],
        [0.1, 3],
        [0.4, 4],
    ]  # those at 0 and below give way to the centre
    np.testing.assert_allclose(scales.numpy(), expected, rtol=1e-6)


# Parameters.


@pytest.mark.parametrize(
    'module',
    [
        UniformQuantizer(4),
        UniformQuantizer(4, axis=-2),
        AdaLogQuantizer(4),
        Rescale(),
        GeluShift(),
    ],
    ids=repr,
)
def test_without_parameters_it_is_the_identity(module):
    x = torch.randn(3, 4, requires_grad=True)
    assert module.params is None and module.state_dict() == {}
    assert module(x) is x


def test_parts_that_need_parameters():
    op = rescaled(nn.Linear(6, 5), GeluShift)
    equip(op, input=AdaLogQuantizer(4), weight=Float(axis=-2))
    assert calibrated_parts(op) == {
        'rescale': op.rescale,
        'input_quantizer': op.input_quantizer,
    }
    assert calibrated_parts(nn.Linear(6, 5)) == {}


def test_float_is_the_identity_whatever_the_bits():
    x = torch.randn(3, 4)
    for quantizer in (Float(), Float(4), Float(8, axis=-2)):
        assert (
            quantizer.bits == 32 and quantizer(x) is x and quantizer.state_dict() == {}
        )


@pytest.mark.parametrize('cls', [UniformQuantizer, AdaLogQuantizer])
@pytest.mark.parametrize('bits', [1, 9, 0, -4, True, 4.0, '4', None])
def test_bits_are_integers_from_2_to_8(cls, bits):
    with pytest.raises(ValueError, match=f'not {bits!r}'):
        cls(bits)


def test_axis_counts_from_the_end():
    with pytest.raises(ValueError, match='must be negative, not 0'):
        UniformQuantizer(4, axis=0)


@pytest.mark.parametrize(
    'params',
    [
        dict(scale=torch.tensor(1.0)),
        dict(zero_point=torch.tensor(1)),
        dict(scale=torch.tensor(1.0), zero_point=torch.tensor(1), q=torch.tensor(1.0)),
        dict(scale=torch.tensor(1.0), zero=torch.tensor(1)),
        dict(scale=torch.tensor(float('nan')), zero_point=torch.tensor(1)),
        dict(scale=torch.tensor(float('inf')), zero_point=torch.tensor(1)),
        dict(scale=torch.tensor(0.0), zero_point=torch.tensor(1)),
        dict(scale=torch.tensor(-1e-9), zero_point=torch.tensor(1)),
    ],
)
def test_set_takes_all_parameters_finite_ones_and_positive_scales(params):
    quantizer = UniformQuantizer(4)
    with pytest.raises(
        ValueError, match=r'takes the parameters|is not finite|is not positive'
    ):
        quantizer.set(**params)


HALF, ONE = torch.tensor(0.5), torch.tensor(1)
EACH = torch.full((3, 1), 0.5), torch.ones(3, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ('axis', 'params', 'fault'),
    [
        (
            None,
            dict(scale=HALF[None], zero_point=ONE),
            r'scale has the shape \(1,\), not 0 dimensions',
        ),
        (
            None,
            dict(scale=HALF, zero_point=ONE[None]),
            r'zero_point has the shape \(1,\)',
        ),
        (
            None,
            dict(scale=torch.tensor(1e-42), zero_point=ONE),
            'scale is too small to divide by',
        ),
        (
            None,
            dict(scale=HALF.half(), zero_point=ONE),
            r'scale is of type torch\.float16',
        ),
        (None, dict(scale=ONE, zero_point=ONE), r'scale is of type torch\.int64'),
        (
            None,
            dict(scale=HALF, zero_point=HALF),
            r'zero_point is of type torch\.float32, not int32',
        ),
        (
            None,
            dict(scale=HALF, zero_point=ONE.bool()),
            r'zero_point is of type torch\.bool',
        ),
        (None, dict(scale=HALF, zero_point=-ONE), 'zero_point is not within 0 to 15'),
        (
            None,
            dict(scale=HALF, zero_point=16 * ONE),
            'zero_point is not within 0 to 15',
        ),
        (
            -2,
            dict(scale=EACH[0].t(), zero_point=EACH[1]),
            r'scale has the shape \(1, 3\), not \(3, 1\)',
        ),
        (
            -2,
            dict(scale=EACH[0][:2], zero_point=EACH[1]),
            r'scale has the shape \(2, 1\), not \(3, 1\)',
        ),
        (
            -2,
            dict(scale=EACH[0], zero_point=EACH[1][:0]),
            r'zero_point has the shape \(0, 1\), not \(3, 1\)',
        ),
        (
            -2,
            dict(scale=HALF, zero_point=ONE),
            r'scale has the shape \(\), not 2 dimensions',
        ),
    ],
)
def test_set_and_checkpoints_take_parameters_of_the_right_shape_type_and_range(
    axis, params, fault
):
    quantizer = UniformQuantizer(4, axis=axis)
    quantizer.groups = None if axis is None else 3
    with pytest.raises(ValueError, match=fault):
        quantizer.set(**params)
    with pytest.raises(QuantizationError, match=fault):
        quantizer.load_state_dict(params)
    assert quantizer.params is None


@pytest.mark.parametrize('q', [0.5, 1001.0, -37.0])
def test_a_base_is_within_what_is_possible(q):
    with pytest.raises(ValueError, match='q is not within 1 to 1000'):
        AdaLogQuantizer(4).set(scale=HALF, q=torch.tensor(q))


def test_a_rejected_set_leaves_the_quantizer_uncalibrated():
    quantizer = AdaLogQuantizer(4)
    with pytest.raises(ValueError, match='q is not finite'):
        quantizer.set(scale=torch.tensor(1.0), q=torch.tensor(float('nan')))
    assert quantizer.params is None


def test_set_copies():
    scale = torch.tensor(0.5, requires_grad=True)
    quantizer = UniformQuantizer(4)
    quantizer.set(scale=scale, zero_point=torch.tensor(3))
    with torch.no_grad():
        scale.fill_(9)
    assert quantizer.scale == 0.5 and not quantizer.scale.requires_grad


def test_clear_forgets():
    quantizer, x = uniform(-1, 1), torch.randn(5)
    quantizer.clear()
    assert (
        quantizer.params is None and quantizer(x) is x and quantizer.state_dict() == {}
    )


def test_groups_have_a_row_each():
    x = torch.arange(24.0).view(2, 3, 4)
    assert UniformQuantizer(4).grouped(x).shape == (1, 24)
    quantizer = UniformQuantizer(4, axis=-2)
    grouped = quantizer.grouped(x)
    assert grouped.shape == (3, 8)
    assert all(
        torch.equal(grouped[row].sort().values, x[:, row].flatten().sort().values)
        for row in range(3)
    )
    assert quantizer.ungrouped(grouped.amax(1)).shape == (3, 1)
    assert quantizer.ungrouped(torch.zeros(7, 3)).shape == (7, 3, 1)


# Checkpoints.

KEYS = {
    'rescale.shift',
    'input_quantizer.scale',
    'input_quantizer.q',
    'weight_quantizer.scale',
    'weight_quantizer.zero_point',
}


def linear(calibrated):
    torch.manual_seed(3)
    op = QuantLinear.from_float(nn.Linear(6, 4))
    op.rescale = GeluShift()
    if not calibrated:
        return equip(op, input=AdaLogQuantizer(4), weight=UniformQuantizer(4, axis=-2))
    op.rescale.set(shift=torch.tensor(0.17))
    return equip(op, input=adalog(4, 20, 2.0), weight=covering(op.weight, 4, -2))


def test_a_state_dict_gives_uncalibrated_modules_their_parameters():
    saved, x = nn.Sequential(linear(True)), torch.randn(5, 6)
    loaded = nn.Sequential(linear(False))
    state = saved.state_dict()
    assert set(state) == {f'0.{key}' for key in ('weight', 'bias', *KEYS)}
    loaded.load_state_dict(state, strict=True)
    assert torch.equal(loaded(x), saved(x))
    expected = saved(x)
    state['0.weight_quantizer.scale'].fill_(100)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize('key', sorted(KEYS))
def test_parameters_of_another_granularity_do_not_load(key):
    state = linear(True).state_dict()
    state[key] = state[key][..., None]
    for calibrated in (False, True):
        with pytest.raises(RuntimeError, match=key.replace('.', r'\.')):
            linear(calibrated).load_state_dict(state, strict=True)


def test_a_float_state_dict_leaves_it_the_identity():
    op, x = linear(False), torch.randn(5, 6)
    torch.manual_seed(4)
    float_layer = nn.Linear(6, 4)
    op.load_state_dict(float_layer.state_dict(), strict=True)
    assert (
        all(quantizer.params is None for quantizer in op.quantizers().values())
        and op.rescale.params is None
    )
    assert torch.equal(op(x), float_layer(x))


def test_a_float_state_dict_does_not_pass_as_a_quantized_one():
    with pytest.raises(RuntimeError, match=r'weight_quantizer\.scale'):
        linear(True).load_state_dict(nn.Linear(6, 4).state_dict(), strict=True)


def test_parameters_move_with_the_module():
    op = linear(True).to(torch.float64)
    assert (
        op.input_quantizer.scale.dtype
        == op.weight_quantizer.scale.dtype
        == op.rescale.shift.dtype
        == torch.float64
    )
    assert op(torch.randn(5, 6, dtype=torch.float64)).dtype == torch.float64


def test_loaded_parameters_are_on_the_device_of_the_module():
    op = linear(False).to('meta')
    op.load_state_dict(linear(True).state_dict())
    assert (
        op.weight_quantizer.scale.device == op.rescale.shift.device == op.weight.device
    )
