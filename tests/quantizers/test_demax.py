"""DeMax against hand-computed rows, the equation in numpy, integer arithmetic, and its
properties.
"""

import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from mmptq.calibration import Block, Call
from mmptq.layers import QuantMatMul
from mmptq.methods import AdaLog, MinMax
from mmptq.quantizers import (
    AdaLogQuantizer,
    DeMaxQuantizer,
    Float,
    Quantizer,
    UniformQuantizer,
)
from mmptq.quantizers.demax import product

from ..conftest import FAST, covering, equip, outputs_of

SIDES = {'float32': np.float32, 'float16': np.float16}


def demax(bits=4, length=5.0, **options):
    """A calibrated quantizer."""
    quantizer = DeMaxQuantizer(bits, **options)
    quantizer.set(length=torch.tensor(length))
    return quantizer


def encoded(quantizer, x):
    return quantizer.encode(x, **quantizer.params)


def by_codes(quantizer, x):
    return quantizer.decode(encoded(quantizer, x), **quantizer.params)


def oracle(x, bits, maxima=1, side='float32'):
    """The equation for rows of float32: values, codes, m, j*, D, and how far each code
    is from the point where rounding changes it.
    """
    rest, taken = np.array(x, np.float64), []
    for _ in range(maxima):
        j = rest.argmax(-1)[..., None]
        taken.append((j, np.take_along_axis(rest, j, -1)))
        np.put_along_axis(rest, j, 0, -1)
    step = (
        (rest.max(-1, keepdims=True).astype(np.float32) / np.float32(2**bits - 1))
        .astype(SIDES[side])
        .astype(np.float64)
    )
    ratio = np.divide(rest, step, where=step > 0, out=np.zeros_like(rest))
    codes = np.clip(np.rint(ratio), 0, 2**bits - 1)
    values = codes * step
    for j, m in taken:
        np.put_along_axis(values, j, m.astype(SIDES[side]), -1)
    j, m = (np.concatenate(part, -1) for part in zip(*taken, strict=True))
    return (
        values,
        codes,
        m.astype(SIDES[side]),
        j,
        step,
        np.abs(ratio - np.floor(ratio) - 0.5),
    )


def probabilities(*shape, seed=0, sharpness=2.5):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sharpness
    ).softmax(-1)


# By hand.


def test_by_hand():
    x = torch.tensor([0.1, 0.59, 0.02, 0.24, 0.05])
    codes, side = encoded(demax(2), x)
    assert side.maximum.tolist() == [x[1].item()] and side.position.tolist() == [1]
    assert side.step.tolist() == pytest.approx([0.08]) and codes.tolist() == [
        1,
        0,
        0,
        3,
        1,
    ]  # 1.25, -, 0.25, 3, 0.625
    assert demax(2)(x).tolist() == pytest.approx([0.08, 0.59, 0, 0.24, 0.08])


def test_two_maxima_by_hand():
    x = torch.tensor([0.11, 0.4, 0.04, 0.3, 0.15])
    codes, side = encoded(demax(2, maxima=2), x)
    assert side.maximum.tolist() == x[[1, 3]].tolist() and side.position.tolist() == [
        1,
        3,
    ]
    assert side.step.tolist() == pytest.approx([0.05]) and codes.tolist() == [
        2,
        0,
        1,
        0,
        3,
    ]
    assert demax(2, maxima=2)(x).tolist() == pytest.approx([0.1, 0.4, 0.05, 0.3, 0.15])


def test_half_precision_by_hand():
    """0.7 is 0.7001953125 in half precision, 0.3/15 = 0.02 is 0.0200042724609375."""
    x = torch.tensor([0.7, 0.3, 0.051])
    assert demax(side='float16')(x).tolist() == [
        0.7001953125,
        15 * 0.0200042724609375,
        3 * 0.0200042724609375,
    ]


def test_ties_between_codes_go_to_the_even_one():
    x = torch.tensor([0.5, 0.375, 0.0625, 0.1875, 0.3125])  # D = 1/8
    assert encoded(demax(2), x)[0].tolist() == [0, 3, 0, 2, 2] and demax(2)(
        x
    ).tolist() == [0.5, 0.375, 0, 0.25, 0.25]


@pytest.mark.parametrize('side', SIDES)
def test_entries_too_small_for_a_step_are_zero(side):
    x = torch.tensor([1e-42, 1, 1e-40])
    assert (
        demax(side=side)(x).tolist() == [0, 1, 0]
        and encoded(demax(side=side), x)[1].step == 0
    )
    assert torch.equal(demax(side=side)(x), by_codes(demax(side=side), x))


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('bits', range(2, 9))
def test_rows_with_a_single_non_zero_are_exact(bits, side):
    x = torch.eye(7) * torch.tensor([1, 0.5, 2**-10, 0.75, 1, 0.125, 1])[:, None]
    quantizer = demax(bits, side=side)
    assert torch.equal(quantizer(x), x) and torch.equal(by_codes(quantizer, x), x)
    codes, side_data = encoded(quantizer, x)
    assert (codes == 0).all() and (side_data.step == 0).all()


@pytest.mark.parametrize('maxima', [2, 3, 7, 9])
def test_rows_with_fewer_non_zeros_than_maxima_are_exact(maxima):
    x = torch.eye(7) * 0.75
    x[3:, 5] = 0.25
    quantizer = demax(maxima=maxima)
    assert torch.equal(quantizer(x), x) and torch.equal(by_codes(quantizer, x), x)


@pytest.mark.parametrize('maxima', [1, 2])
@pytest.mark.parametrize('length', [1, 2, 49])
def test_rows_of_zeros_stay(length, maxima):
    x = torch.zeros(2, 3, length)
    assert torch.equal(demax(maxima=maxima)(x), x) and torch.equal(
        by_codes(demax(maxima=maxima), x), x
    )


@pytest.mark.parametrize('maxima', [1, 2, 3])
@pytest.mark.parametrize('bits', [2, 8])
def test_rows_of_one_or_two_entries_are_exact(bits, maxima):
    x = torch.cat([probabilities(50, 2), torch.tensor([[0.5, 0.5]])])
    torch.testing.assert_close(demax(bits, maxima=maxima)(x), x, rtol=1e-6, atol=0)
    assert torch.equal(demax(bits, maxima=maxima)(x[:, :1]), x[:, :1])


@pytest.mark.parametrize('length', [3, 8, 49, 197])
def test_of_equal_entries_the_first_is_taken_out(length):
    x = torch.full((4, length), 1 / length)
    codes, side = encoded(demax(), x)
    assert (side.position == 0).all() and (side.maximum == x[0, 0]).all()
    assert (codes[:, 0] == 0).all() and (codes[:, 1:] == 15).all()
    torch.testing.assert_close(demax()(x), x, rtol=1e-6, atol=0)


def test_two_equal_maxima_by_hand():
    x = torch.tensor([0.1, 0.4, 0.4])
    codes, side = encoded(demax(2), x)
    assert side.position.tolist() == [1] and codes.tolist() == [1, 0, 3]
    assert demax(2)(x).tolist() == pytest.approx([0.4 / 3, 0.4, 0.4])


def test_masked_entries_stay_zero_and_do_not_matter():
    x = probabilities(3, 20, 30)
    masked = torch.cat([x, torch.zeros(3, 20, 19)], -1)
    assert (
        torch.equal(demax()(masked)[..., :30], demax()(x))
        and (demax()(masked)[..., 30:] == 0).all()
    )
    masked[:, 7] = 0  # and one row wholly
    out = demax()(masked)
    assert (out[:, 7] == 0).all() and torch.equal(out[:, 8:, :30], demax()(x)[:, 8:])


# The equation.


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('maxima', [1, 2, 3])
@pytest.mark.parametrize('bits', range(2, 9))
def test_equals_the_equation(bits, maxima, side):
    """The codes are those of the rounded step where side data are in half precision."""
    x = torch.cat(
        [
            probabilities(6, 49, 49, seed=bits, sharpness=sharpness)
            for sharpness in (0.5, 2.5, 6)
        ]
    )
    values, codes, m, j, step, from_tie = oracle(x.numpy(), bits, maxima, side)
    quantizer = demax(bits, maxima=maxima, side=side)
    ours, side_data = encoded(quantizer, x)
    assert np.array_equal(side_data.position.numpy(), j) and np.array_equal(
        side_data.maximum.numpy(), m.astype(np.float32)
    )
    assert np.array_equal(side_data.step.numpy(), step.astype(np.float32))
    clear = from_tie > 1e-4
    assert (
        clear.mean() > 0.98
        and codes.max() == 2**bits - 1
        and np.array_equal(ours.numpy()[clear], codes[clear])
    )
    np.testing.assert_allclose(quantizer(x).numpy()[clear], values[clear], rtol=1e-6)


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('maxima', [1, 2])
def test_what_is_encoded(maxima, side):
    x = probabilities(2, 3, 20, 30)
    for bits in range(2, 9):
        codes, side_data = encoded(demax(bits, maxima=maxima, side=side), x)
        assert (
            codes.dtype == torch.int16
            and codes.shape == x.shape
            and codes.min() == 0
            and codes.max() == 2**bits - 1
        )
        assert (
            side_data.position.dtype == torch.int64
            and (codes.gather(-1, side_data.position) == 0).all()
        )
        assert side_data.position.shape == side_data.maximum.shape == (
            2,
            3,
            20,
            maxima,
        ) and side_data.step.shape == (2, 3, 20, 1)
        if side == 'float32':
            assert torch.equal(side_data.maximum, x.gather(-1, side_data.position))
        for value in (side_data.maximum, side_data.step):
            assert torch.equal(value, value.to(getattr(torch, side)).float())


entries = st.one_of(
    st.floats(2**-40, 1, width=32), st.sampled_from([0.0, 0.25, 0.5, 1.0])
)
rows = given(
    row=st.lists(entries, min_size=1, max_size=60),
    bits=st.integers(2, 8),
    maxima=st.sampled_from([1, 1, 2, 3]),
)


@rows
@example(row=[0.5, 0.5, 0.5], bits=2, maxima=1)
@example(row=[0.0, 1.0], bits=2, maxima=1)
def test_error_is_at_most_half_a_step_and_maxima_are_exact(row, bits, maxima):
    x = torch.tensor(row)
    quantizer = demax(bits, maxima=maxima)
    out, side = quantizer(x), encoded(quantizer, x)[1]
    assert ((out - x).abs() <= 0.5 * side.step * (1 + 1e-4)).all()
    count = min(maxima, len(row))
    assert torch.equal(out.sort().values[-count:], x.sort().values[-count:])
    np.testing.assert_allclose(
        side.step.item(),
        (sorted(row)[-count - 1] if len(row) > count else 0) / (2**bits - 1),
        rtol=1e-6,
    )


@rows
def test_idempotent(row, bits, maxima):
    quantizer = demax(bits, maxima=maxima)
    once = quantizer(torch.tensor(row))
    torch.testing.assert_close(quantizer(once), once, rtol=1e-5, atol=0)


@rows
def test_zero_stays_exactly_zero_and_nothing_becomes_negative(row, bits, maxima):
    x = torch.tensor(row)
    out = demax(bits, maxima=maxima)(x)
    assert (out[x == 0] == 0).all() and (out >= 0).all()


@rows
def test_monotone(row, bits, maxima):
    assert (
        demax(bits, maxima=maxima)(torch.tensor(row).sort().values).diff() >= -1e-7
    ).all()  # D (N-1) is rounded


@given(
    length=st.integers(1, 300),
    seed=st.integers(0, 99),
    sharpness=st.floats(0, 20),
    bits=st.integers(2, 8),
    maxima=st.integers(1, 3),
    side=st.sampled_from([*SIDES]),
)
def test_forward_is_decode_of_encode_bit_for_bit_at_any_length(
    length, seed, sharpness, bits, maxima, side
):
    x = probabilities(3, length, seed=seed, sharpness=sharpness)
    quantizer = demax(bits, maxima=maxima, side=side)
    assert (
        torch.equal(quantizer(x), by_codes(quantizer, x))
        and torch.isfinite(quantizer(x)).all()
    )


@given(length=st.integers(1, 60), seed=st.integers(0, 99), bits=st.integers(2, 8))
def test_each_row_by_itself(length, seed, bits):
    x = probabilities(2, 4, length, seed=seed)
    out = demax(bits)(x)
    assert all(
        torch.equal(demax(bits)(x[i, j]), out[i, j]) for i in range(2) for j in range(4)
    )


LAYOUTS = {
    'empty': lambda: torch.rand(0, 3, 4, 5),
    'large': lambda: torch.rand(7, 3, 60, 60),
    'one window': lambda: torch.rand(1, 3, 150, 150),
    'long first dimension': lambda: torch.rand(70001, 3),
    'permuted': lambda: torch.rand(60, 3, 9, 70).permute(2, 1, 0, 3),
    'transposed': lambda: torch.rand(3, 200, 150).transpose(1, 2),
    'transposed ties': (
        lambda: torch.rand(3, 200, 150).mul(4).round().div(4).transpose(1, 2)
    ),
    'sliced': lambda: torch.rand(9, 3, 120, 120)[::2, :, 1::2, ::3],
    'expanded': lambda: torch.rand(1, 3, 50, 50).expand(11, -1, -1, -1),
    'one row': lambda: torch.rand(300),
    'one very long row': lambda: torch.rand(70000),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_forward_is_decode_of_encode_bit_for_bit_in_any_layout(layout):
    torch.manual_seed(1)
    x, quantizer = LAYOUTS[layout](), demax(6)
    before = x.clone()
    out = quantizer(x)
    assert (
        out.shape == x.shape
        and out.dtype == torch.float32
        and torch.equal(out, by_codes(quantizer, x))
        and torch.equal(x, before)
    )
    assert torch.equal(out, quantizer(x.contiguous())) and (
        x.numel() == 0 or not torch.equal(out, x)
    )


def test_a_change_before_it():
    x = probabilities(5, 40, 40)
    assert torch.equal(demax()(x, lambda piece: piece * 0.3), demax()(x * 0.3))
    assert torch.equal(DeMaxQuantizer(4)(x, lambda piece: piece * 0.3), x * 0.3)


@pytest.mark.parametrize(
    ('dtype', 'precision'), [(torch.float64, 1e-12), (torch.bfloat16, 2**-7)]
)
def test_other_types(dtype, precision):
    x = probabilities(5, 40, 49).to(dtype)
    quantizer = demax()
    out, (_, side) = quantizer(x), encoded(quantizer, x)
    assert out.dtype == dtype and torch.equal(out, by_codes(quantizer, x))
    bound = 0.5 * side.step.double() + precision * x.double()
    assert ((out.double() - x.double()).abs() <= bound * (1 + precision)).all()


# In integers.


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('maxima', [1, 2])
@pytest.mark.parametrize(
    ('shape', 'value_shape'),
    [
        ((49, 49), (49, 8)),
        ((6, 2, 49, 49), (6, 2, 49, 8)),
        ((2, 3, 5, 30), (2, 3, 30, 1)),
        ((4, 2, 7, 1), (4, 2, 1, 3)),
        ((6, 2, 10, 16), (2, 16, 4)),
    ],
    ids=str,
)
def test_the_integer_product_is_that_of_what_is_decoded(
    shape, value_shape, maxima, side
):
    p, v = (
        probabilities(*shape),
        torch.randn(value_shape, generator=torch.Generator().manual_seed(1)).double(),
    )
    for bits in (2, 4, 8):
        quantizer = demax(bits, maxima=maxima, side=side)
        (codes, side_data), expected = encoded(quantizer, p), quantizer(p).double() @ v
        double = side_data._replace(
            maximum=side_data.maximum.double(), step=side_data.step.double()
        )
        assert (
            product((codes, double), v) - expected
        ).abs().max() <= 1e-6 * expected.abs().max()
        single = product((codes, side_data), v.float())
        assert (
            single.shape == expected.shape
            and (single - expected).abs().max() <= 1e-5 * expected.abs().max()
        )


def test_the_integer_product_in_numpy():
    """D (codes V) with integer V, one product of integers, and m V[j*]."""
    p, v = (
        probabilities(2, 20, 30).numpy(),
        np.random.default_rng(0).integers(-128, 128, (2, 30, 5)),
    )
    _, codes, m, j, step, _ = oracle(p, 4)
    expected = step * (codes.astype(int) @ v) + m * np.take_along_axis(v, j, -2)
    ours = product(encoded(demax(), torch.from_numpy(p)), torch.from_numpy(v).float())
    clear = np.abs(ours.numpy() - expected) <= 1e-5 * np.abs(expected).max()
    assert clear.mean() > 0.98  # but for codes on the edge between two


# Bits, parameters and options.


@pytest.mark.parametrize('bits', range(2, 9))
def test_effective_bits_of_windows(bits):
    assert demax(bits, 49.0, side='float16').effective_bits == pytest.approx(
        bits + 0.78, abs=0.005
    )  # (16 + 16 + 6) / 49


@pytest.mark.parametrize(
    ('length', 'options', 'extra'),
    [
        (49.0, {}, (32 + 32 + 6) / 49),
        (49.0, dict(maxima=2, side='float16'), (3 * 16 + 2 * 6) / 49),
        (64.0, {}, 70 / 64),
        (65.0, {}, 71 / 65),
        (1.0, {}, 65),
        (2.0, dict(side='float16'), 33 / 2),
        (144.5, dict(side='float16'), 40 / 144.5),
        (
            4.0,
            dict(maxima=9, side='float16'),
            (5 * 16 + 4 * 2) / 4,
        ),  # a row of 4 has no more than 4
    ],
)
def test_effective_bits_by_hand(length, options, extra):
    assert demax(4, length, **options).effective_bits == pytest.approx(4 + extra)


def test_before_calibration_it_is_the_identity():
    x = torch.randn(3, 7)
    quantizer = DeMaxQuantizer(2)
    assert (
        quantizer(x) is x
        and quantizer.params is None
        and quantizer.effective_bits == 2
        and not quantizer.state_dict()
    )
    quantizer.set(length=torch.tensor(7.0))
    assert not torch.equal(quantizer(x), x)
    quantizer.clear()
    assert quantizer(x) is x


def test_checkpoints_bring_the_length():
    saved, fresh = (
        demax(3, 30.5, side='float16').state_dict(),
        DeMaxQuantizer(3, side='float16'),
    )
    assert set(saved) == {'length'} and saved['length'].shape == ()
    fresh.load_state_dict(saved)
    x = probabilities(4, 30)
    assert fresh.length == 30.5 and torch.equal(fresh(x), demax(3, side='float16')(x))
    with pytest.raises(
        RuntimeError, match=r'length has the shape \(1,\), not 0 dimensions'
    ):
        fresh.load_state_dict({'length': torch.ones(1)})


def test_a_length_must_be_finite():
    with pytest.raises(ValueError, match='length is not finite'):
        DeMaxQuantizer(4).set(length=torch.tensor(torch.inf))
    with pytest.raises(ValueError, match='length is not a length, of at least 1'):
        DeMaxQuantizer(4).set(length=torch.tensor(0.5))


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        (dict(maxima=0), 'maxima'),
        (dict(maxima=-1), 'maxima'),
        (dict(maxima=True), 'maxima'),
        (dict(maxima=1.5), 'maxima'),
        (dict(maxima='2'), 'maxima'),
        (dict(maxima=None), 'maxima'),
        (dict(side='float64'), 'side'),
        (dict(side=None), 'side'),
        (dict(side=['float16']), 'side'),
        (dict(bits=9), 'bits'),
        (dict(bits=1), 'bits'),
        (dict(bits=4.0), 'bits'),
        (dict(bits=True), 'bits'),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(
        ValueError,
        match=rf'^{named} .*not {re.escape(repr(next(iter(options.values()))))}',
    ):
        DeMaxQuantizer(**{'bits': 4, **options})


def test_what_kind_of_quantizer_each_is():
    kinds = {
        cls: (cls.uniform, cls.dynamic)
        for cls in (Quantizer, UniformQuantizer, AdaLogQuantizer, Float, DeMaxQuantizer)
    }
    assert kinds == {
        Quantizer: (False, False),
        UniformQuantizer: (True, False),
        AdaLogQuantizer: (False, False),
        Float: (False, False),
        DeMaxQuantizer: (True, True),
    }


@pytest.mark.parametrize(
    'quantizer',
    [UniformQuantizer(4), AdaLogQuantizer(4), Float()],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_only_dynamic_quantizers_observe(quantizer):
    with pytest.raises(NotImplementedError):
        quantizer.observed([torch.ones(3)])


def test_there_is_nothing_to_search():
    with pytest.raises(NotImplementedError, match='nothing to search'):
        DeMaxQuantizer(4).rounder(torch.ones(1, 1, 2, 3))


# Calibration.


def attention(length, windows, seed=0, heads=2):
    return (
        probabilities(windows, heads, length, length, seed=seed),
        torch.randn(
            windows, heads, length, 4, generator=torch.Generator().manual_seed(seed)
        ),
    )


@pytest.mark.parametrize(
    ('samples', 'length'),
    [
        ([(2, 3, 10, 7)], 7),
        ([(6, 4), (2, 12)], 6),
        ([(1, 5), (3, 1)], 2),
        ([(8,)], 8),
        ([(0, 5), (4, 3)], 3),
    ],
    ids=str,
)
def test_the_length_is_the_mean_over_rows(samples, length):
    params = DeMaxQuantizer(4).observed([torch.rand(shape) for shape in samples])
    assert (
        set(params) == {'length'}
        and params['length'].shape == ()
        and params['length'] == length
    )


def test_a_block_sets_it_from_all_its_rows():
    op = equip(QuantMatMul(), left=DeMaxQuantizer(4))
    calls = [Call(attention(49, 6)), Call(attention(16, 3)), Call(attention(49, 2, 1))]
    Block('pv', op, calls, {'pv': op}).observe(10**6)
    many, few = 2 * 8 * 49, 2 * 3 * 16
    assert (
        op.left_quantizer.length.item()
        == pytest.approx((many * 49 + few * 16) / (many + few))
        and op.right_quantizer.params is None
    )


@pytest.mark.parametrize(
    'method', [MinMax(), AdaLog(**FAST)], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize('side', SIDES)
def test_other_methods_take_it(method, side):
    op = equip(
        QuantMatMul(),
        left=DeMaxQuantizer(4, side=side),
        right=UniformQuantizer(8, axis=-3),
    )
    p, v = attention(49, 6)
    outputs = outputs_of(
        method, Block('pv', op, [Call((p, v)), Call(attention(49, 2, 1))], {'pv': op})
    )
    assert (
        torch.equal(outputs[0], p @ v)
        and op.left_quantizer.length == 49
        and op.right_quantizer.params is not None
    )
    assert op.left_quantizer.effective_bits == pytest.approx(
        4 + ({'float32': 64, 'float16': 32}[side] + 6) / 49
    )
    expected = (
        oracle(p.numpy(), 4, side=side)[0] @ op.right_quantizer(v).double().numpy()
    )
    np.testing.assert_allclose(
        op(p, v).numpy(), expected, rtol=1e-3, atol=0.02
    )  # codes on the edge between two
    assert np.abs(op(p, v).numpy() - expected).mean() < 1e-4


@torch.no_grad()
def test_it_beats_uniform_codes_where_rows_have_a_peak():
    p, v = attention(49, 6)
    errors = {}
    for left in (DeMaxQuantizer(4), UniformQuantizer(4)):
        op = equip(QuantMatMul(), left=left, right=Float())
        outputs_of(MinMax(), Block('pv', op, [Call((p, v))], {'pv': op}))
        errors[type(left)] = (op(p, v) - p @ v).square().sum()
    assert errors[DeMaxQuantizer] < 0.3 * errors[UniformQuantizer]


class Product(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, p, v):
        return self.op(p.softmax(-1), v)


@pytest.mark.parametrize('options', [{}, dict(maxima=2, side='float16')], ids=str)
@pytest.mark.parametrize('strict', [True, False])
def test_export(strict, options):
    _, v = attention(16, 3)
    scores = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(2)) * 3
    module = Product(
        equip(QuantMatMul(), left=demax(3, **options), right=covering(v, 4, -3))
    )
    exported = torch.export.export(module, (scores, v), strict=strict).module()
    torch.testing.assert_close(
        exported(scores, v), module(scores, v), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(exported(scores, v), scores.softmax(-1) @ v, atol=1e-3)
