"""Uniform quantization against hand-computed numbers, the equation in numpy, and its properties."""
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mmptq.quantizers import UniformQuantizer
from mmptq.quantizers.uniform import quantiles

from ..conftest import covering, oracle_range, oracle_uniform, uniform, uniform_codes, uniform_values


def test_by_hand():
    quantizer = UniformQuantizer(2)
    params = dict(scale=torch.tensor(0.5), zero_point=torch.tensor(1, dtype=torch.int32))
    quantizer.set(**params)
    x = torch.tensor([-2, -0.5, -0.26, -0.24, 0, 0.24, 0.26, 0.9, 1.0, 7])
    assert quantizer.encode(x, **params).tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert quantizer(x).tolist() == [-0.5, -0.5, -0.5, 0, 0, 0, 0.5, 1, 1, 1]
    assert quantizer(torch.tensor([-0.25, 0.25, 0.75])).tolist() == [0, 0, 1]  # ties go to the even integer
    assert quantizer.levels == 4


def test_range_by_hand():
    quantizer = UniformQuantizer(4)
    for low, high, scale, zero_point in [(-1, 2, 0.2, 5), (-3, 12, 1, 3), (0, 15, 1, 0), (2, 15, 1, 0), (-15, -2, 1, 15), (-30, 0, 2, 15),
                                         (7.5, 7.5, 0.5, 0), (-7.5, -7.5, 0.5, 15), (0, 0, 1, 0)]:
        params = quantizer.range_params(torch.tensor(float(low)), torch.tensor(float(high)))
        assert params['scale'].item() == pytest.approx(scale, rel=1e-7) and params['zero_point'].item() == zero_point
        assert params['zero_point'].dtype == torch.int32 and params['scale'].dtype == torch.float32


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize(('shape', 'axis'), [((9, 40), None), ((6, 50), -2), ((6, 3, 5, 5), -4), ((2, 3, 11, 9), -3)])
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
    assert np.array_equal(quantizer(x).numpy(), uniform_values(ours.numpy(), scale, zero_point))


@pytest.mark.parametrize(('shape', 'axis'), [((9, 40), None), ((6, 50), -2), ((2, 3, 11, 9), -3)])
def test_ranges_equal_the_equation(shape, axis):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)) + torch.linspace(-3, 3, shape[-2])[:, None]
    quantizer = covering(x, 4, axis)
    others = tuple(d for d in range(-len(shape), 0) if d != axis)
    low, high = (f(x.numpy(), axis=None if axis is None else others, keepdims=axis is not None) for f in (np.amin, np.amax))
    scale, zero_point = oracle_range(low, high, 4)
    np.testing.assert_allclose(quantizer.scale.numpy().ravel(), scale.ravel(), rtol=1e-6)
    assert np.array_equal(quantizer.zero_point.numpy().ravel(), zero_point.ravel())


finite = st.floats(-2.0**100, 2.0**100, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-100)
cases = given(bits=st.integers(2, 8), ends=st.tuples(finite, finite),
              places=st.lists(st.floats(-0.5, 1.5, width=32), min_size=1, max_size=30))


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
    assert ((quantizer(inside.float()).double() - inside).abs() <= 0.5 * scale + 1e-6 * (scale + inside.abs())).all()


@cases
def test_zero_is_exact(bits, ends, places):
    quantizer, _ = quantized_case(bits, ends, places)
    assert (quantizer(torch.zeros(3)) == 0).all()


@given(bits=st.integers(2, 8), ends=st.tuples(finite, finite), values=st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_codes_are_within_range_whatever_the_values(bits, ends, values):
    quantizer = uniform(min(ends), max(ends), bits)
    codes = quantizer.encode(torch.tensor(values), **quantizer.params)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1


@pytest.mark.parametrize(('values', 'exact'), [(0.0, True), (5.0, True), (-5.0, True), (1e-30, True), (1e-42, False)])
def test_constant_inputs(values, exact):
    x = torch.full((4, 6), values)
    quantizer = covering(x, 4)
    assert quantizer.scale > 0 and torch.isfinite(quantizer.scale)
    torch.testing.assert_close(quantizer(x), x, rtol=1e-6 if exact else 0, atol=0 if exact else 1e-41)


def test_a_range_too_wide_for_its_dtype_is_not_set():
    with pytest.raises(ValueError, match='scale is not finite'):
        uniform(-3e38, 3e38)


# Candidates.

@pytest.mark.parametrize('count', [1, 4, 64, 100])
def test_candidates_begin_with_the_extremes_and_go_inwards(count):
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(6)) * torch.tensor([[1.0], [10], [0.1]])
    quantizer = UniformQuantizer(4, axis=-2)
    candidates = quantizer.candidates(values, count)
    widest = quantizer.range_params(values.amin(1), values.amax(1))
    number = len(candidates['scale'])
    assert candidates['scale'].shape == candidates['zero_point'].shape == (number, 3)
    assert number == max(2, int(count**0.5))**2
    assert torch.equal(candidates['scale'][0], widest['scale']) and torch.equal(candidates['zero_point'][0], widest['zero_point'])
    assert (candidates['scale'] <= widest['scale'] * 1.000001).all() and (candidates['scale'] > 0).all()
    low, high = np.quantile(values.numpy(), (0.1, 0.9), axis=1)
    np.testing.assert_allclose(candidates['scale'].amin(0).numpy(), (high - low) / 15, rtol=1e-5)
    alone = UniformQuantizer(4).candidates(values[1:2], count)
    assert torch.equal(alone['scale'][:, 0], candidates['scale'][:, 1])


def test_candidates_move_each_end_by_itself():
    values = torch.randn(1, 1000, generator=torch.Generator().manual_seed(7))
    params = UniformQuantizer(8).candidates(values, 16)
    low, high = np.quantile(values.numpy(), (0.1, 0.9))
    widths = params['scale'].flatten() * 255
    for width in (values.max() - low, high - values.min()):  # one end at the extreme, the other inside
        assert (widths - width).abs().min() < 1e-5


@pytest.mark.parametrize('values', [0.0, 3.0, -3.0, 1e-42])
def test_candidates_of_constant_values_are_usable(values):
    x = torch.full((2, 50), values)
    candidates = UniformQuantizer(4, axis=-2).candidates(x, 16)
    assert torch.isfinite(candidates['scale']).all() and (candidates['scale'] > 0).all()
    assert (candidates['zero_point'] == (15 if values < -1 else 0)).all()


def test_candidates_of_negative_values_keep_zero():
    values = -torch.rand(1, 200, generator=torch.Generator().manual_seed(8)) - 0.5
    for scale, zero_point in zip(*UniformQuantizer(4).candidates(values, 16).values(), strict=True):
        assert zero_point == 15 and oracle_uniform(0.0, scale.numpy(), zero_point.numpy(), 4) == 0


def test_quantiles_of_long_rows_keep_the_extremes():
    values = torch.rand(2, 3 * 2**16, generator=torch.Generator().manual_seed(9))
    values[0, 1], values[1, 2] = 50, -50  # between the values that thinning keeps
    found = quantiles(values, (0, 0.1, 0.9, 1))
    assert found[0, 1] == -50 and found[3, 0] == 50
    np.testing.assert_allclose(found[1:3].numpy(), [[0.1, 0.1], [0.9, 0.9]], atol=0.01)


def test_quantiles_of_short_rows_are_those_of_numpy():
    values = torch.randn(3, 101, generator=torch.Generator().manual_seed(10))
    found = quantiles(values, (0, 0.1, 0.9, 1))
    np.testing.assert_allclose(found.numpy(), np.quantile(values.numpy(), (0, 0.1, 0.9, 1), axis=1), rtol=1e-5)
