"""Integer operations: their sums are those of an int64 reference, to the last one;
their outputs those of the simulation.

Scales are 1 or powers of two here, without a bias, so that an output is an exact
multiple of a sum.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmptq import QuantizationError
from mmptq.layers import GeluShift, QuantConv2d, QuantLinear, QuantMatMul, Rescale
from mmptq.quantizers import DeMaxQuantizer
from mmptq.quantizers.base import CHUNK, Float
from mmptq.quantizers.demax import product
from mmptq.runtime import kernels
from mmptq.runtime.choice import choose_backend, has_onednn
from mmptq.runtime.coders import Uniform
from mmptq.runtime.conv import IntegerConv2d
from mmptq.runtime.errors import NoIntegerForm
from mmptq.runtime.int8 import int8_parts
from mmptq.runtime.linear import IntegerLinear
from mmptq.runtime.matmul import IntegerMatMul
from mmptq.runtime.products import int_mm

from ..conftest import adalog, covering, equip, rescaled
from .conftest import whole

pytestmark = pytest.mark.usefixtures('uncompiled')

needs_vnni = pytest.mark.skipif(
    not has_onednn(torch.device('cpu')), reason='needs oneDNN and a CPU with VNNI'
)
bits = st.integers(2, 8)
seeds = st.integers(0, 2**32 - 1)


def integer_linear(op):
    """By what the CPU has, or is made to seem to have."""
    return IntegerLinear(op, choose_backend(torch.device('cpu')))


def integer_conv(op):
    return IntegerConv2d(op, choose_backend(torch.device('cpu')))


@st.composite
def zero_points(draw, width, count):
    """Of codes of a width, the ends as often as what is between."""
    most = 2**width - 1
    return [
        draw(st.sampled_from((0, most)) | st.integers(0, most)) for _ in range(count)
    ]


def numbers(generator, bits, *shape):
    """Reals from far below to far above what the codes of scale 1 reach, halves among
    them.
    """
    return np.round(generator.uniform(-2.5 * 2**bits, 2.5 * 2**bits, shape) * 2) / 2


def integers(x, zero_point, bits):
    """``code - z`` at scale 1, int64."""
    return (
        np.clip(np.rint(x).astype(np.int64) + zero_point, 0, 2**bits - 1) - zero_point
    )


def weights(generator, zero_point, bits, *shape):
    """Integers that codes with these zero points, of the first dimension, stand for;
    the ends of the range among them.
    """
    codes = generator.integers(0, 2**bits, shape)
    codes.reshape(-1)[generator.integers(0, codes.size, 2)] = 0, 2**bits - 1
    return codes - np.asarray(zero_point).reshape(-1, *[1] * (len(shape) - 1))


def tensor(x):
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def linear(weight, weight_zero, weight_bits, zero, input_bits):
    """A layer of scale 1 without bias."""
    op = QuantLinear(weight.shape[1], weight.shape[0], bias=False)
    op.weight.data = tensor(weight)
    return equip(
        op,
        input=whole(1, zero, input_bits),
        weight=whole(1, weight_zero, weight_bits, axis=-2),
    )


def no_more_than_float32_holds(sums):
    """Sums beyond 2^24 are rounded once, when they become an output."""
    return sums.astype(np.float32)


@pytest.mark.parametrize('path', ['_int_mm', pytest.param('onednn', marks=needs_vnni)])
@given(
    data=st.data(),
    weight_bits=bits,
    input_bits=bits,
    seed=seeds,
    rows=st.integers(1, 9),
    inner=st.integers(1, 70),
    out=st.integers(1, 99),
)
def test_the_sums_of_a_linear_layer_are_exact(
    path, data, weight_bits, input_bits, seed, rows, inner, out
):
    weight_zero, (zero,) = (
        data.draw(zero_points(weight_bits, out)),
        data.draw(zero_points(input_bits, 1)),
    )
    generator = np.random.default_rng(seed)
    x, weight = (
        numbers(generator, input_bits, rows, inner),
        weights(generator, weight_zero, weight_bits, out, inner),
    )
    with pytest.MonkeyPatch.context() as patch:
        if path == '_int_mm':
            patch.setattr(torch.cpu, '_is_vnni_supported', lambda: False)
        layer = integer_linear(
            linear(weight, weight_zero, weight_bits, zero, input_bits)
        )
        result = layer(tensor(x)).numpy()
    assert (layer.path.removesuffix(', by _int_mm') != 'int8') == bool(
        (weight > 127).any() or (weight < -128).any()
    )
    assert ('_int_mm' in layer.path) == (path == '_int_mm')
    np.testing.assert_array_equal(
        result, no_more_than_float32_holds(integers(x, zero, input_bits) @ weight.T)
    )


@pytest.mark.parametrize('onednn', [False, pytest.param(True, marks=needs_vnni)])
def test_the_largest_sums_of_long_rows(onednn, monkeypatch):
    """All codes at one end and the zero points at the other: 255 * 255 each, in 3072
    columns.
    """
    if not onednn:
        monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: False)
    weight = np.full((3, 3072), 255)
    weight[1], weight[2] = 0, -255
    op = linear(weight, [0, 0, 255], 8, 0, 8)
    result = integer_linear(op)(torch.full((2, 3072), 1000.0))
    assert (
        result.tolist()
        == [
            [
                float(np.float32(255 * 255 * 3072)),
                0,
                -float(np.float32(255 * 255 * 3072)),
            ]
        ]
        * 2
    )


@given(
    seed=seeds,
    rows=st.integers(1, 9),
    inner=st.integers(1, 300),
    columns=st.integers(1, 9),
)
def test_the_helpers_are_exact(seed, rows, inner, columns):
    generator = np.random.default_rng(seed)
    left = generator.integers(-255, 256, (rows, inner))
    parts = int8_parts(torch.tensor(left))
    assert len(parts) <= (3 if left.max() == 255 else 2) and all(
        part.dtype == torch.int8 for part in parts
    )
    assert np.array_equal(sum(part.to(torch.int64) for part in parts).numpy(), left)
    codes, zero = generator.integers(0, 256, (rows, inner)), generator.integers(256)
    weight = generator.integers(-128, 128, (columns, inner))
    result = int_mm(
        torch.tensor(codes, dtype=torch.uint8),
        torch.tensor(weight, dtype=torch.int8),
        int(zero),
        torch.tensor(weight.sum(1)),
    )
    assert np.array_equal(result.numpy(), (codes - zero) @ weight.T)


@needs_vnni
@given(
    data=st.data(),
    weight_bits=bits,
    input_bits=bits,
    seed=seeds,
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    mode=st.sampled_from(['zeros', 'reflect', 'replicate', 'circular']),
    channels=st.sampled_from([(1, 1, 1), (3, 5, 1), (4, 6, 2), (4, 4, 4)]),
)
def test_the_sums_of_a_convolution_are_exact(
    data,
    weight_bits,
    input_bits,
    seed,
    size,
    kernel,
    stride,
    dilation,
    padding,
    mode,
    channels,
):
    inside, out, groups = channels
    weight_zero, (zero,) = (
        data.draw(zero_points(weight_bits, out)),
        data.draw(zero_points(input_bits, 1)),
    )
    generator = np.random.default_rng(seed)
    x = numbers(generator, input_bits, 2, inside, *size)
    weight = weights(
        generator, weight_zero, weight_bits, out, inside // groups, *kernel
    )
    op = QuantConv2d.from_float(
        nn.Conv2d(
            inside,
            out,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=mode,
        )
    )
    op.weight.data = tensor(weight)
    equip(
        op,
        input=whole(1, zero, input_bits),
        weight=whole(1, weight_zero, weight_bits, axis=-4),
    )
    if groups > 1 and bool((weight > 127).any() or (weight < -128).any()):
        with pytest.raises(NoIntegerForm, match='in groups'):
            integer_conv(op)
        return
    double = nn.Conv2d(
        inside,
        out,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=False,
        padding_mode=mode,
    ).double()
    double.weight.data = torch.tensor(weight, dtype=torch.float64)
    with torch.no_grad():
        expected = double(
            torch.tensor(integers(x, zero, input_bits), dtype=torch.float64)
        ).numpy()
    np.testing.assert_array_equal(
        integer_conv(op)(tensor(x)).numpy(), no_more_than_float32_holds(expected)
    )


@given(
    data=st.data(),
    left_bits=bits,
    right_bits=bits,
    seed=seeds,
    rows=st.integers(1, 5),
    inner=st.integers(1, 20) | st.integers(255, 270),
    columns=st.integers(1, 5),
    batch=st.integers(0, 2),
)
def test_the_sums_of_products_with_parameters_per_head_are_exact(
    data, left_bits, right_bits, seed, rows, inner, columns, batch
):
    """Where 8-bit rows are long (from 258 on), sums go beyond what float32 holds."""
    zeros = [
        np.reshape(data.draw(zero_points(width, 2)), (2, 1, 1))
        for width in (left_bits, right_bits)
    ]
    generator = np.random.default_rng(seed)
    left, right = (
        numbers(generator, left_bits, batch, 2, rows, inner),
        numbers(generator, right_bits, batch, 2, inner, columns),
    )
    scale = np.array([1, 0.25]).reshape(2, 1, 1)
    op = equip(
        QuantMatMul(),
        left=whole(scale.ravel(), zeros[0].ravel(), left_bits, axis=-3),
        right=whole(1, zeros[1].ravel(), right_bits, axis=-3),
    )
    sums = integers(left, zeros[0], left_bits) @ integers(right, zeros[1], right_bits)
    np.testing.assert_array_equal(
        IntegerMatMul(op)(tensor(left * scale), tensor(right)).numpy(),
        no_more_than_float32_holds(sums) * scale,
    )


def test_parameters_along_the_first_dimension():
    """Heads without a batch, too many values for one piece."""
    op = equip(
        QuantMatMul(),
        left=whole([1, 2, 4], [7, 8, 9], 4, axis=-3),
        right=whole([1, 0.5, 2], [8, 3, 0], 4, axis=-3),
    )
    left, right = torch.randn(3, 300, 200) * 5, torch.randn(3, 200, 150) * 5
    assert left.numel() > CHUNK < right.numel()
    near(IntegerMatMul(op)(left, right), op(left, right))


def test_long_rows_are_exact():
    """258 columns of 255 * 255 are the last that float32 holds; what is rounded is the
    result.
    """
    layer = IntegerMatMul(
        equip(QuantMatMul(), left=whole(1, 0, 8), right=whole(1, 0, 8))
    )
    for inner in (258, 259, 400, 1025):
        left = torch.full((1, 1, 1, inner), 300.0)
        left[..., -1] = 254
        result = layer(left, torch.full((1, 1, inner, 1), 255.0))
        assert float(result) == float(np.float32(255 * 255 * inner - 255))


@given(
    bits=bits,
    maxima=st.integers(1, 3),
    side=st.sampled_from(['float32', 'float16']),
    seed=seeds,
    rows=st.integers(1, 6),
    length=st.integers(1, 12) | st.just(300),
    ties=st.booleans(),
)
def test_demax_is_its_product(bits, maxima, side, seed, rows, length, ties):
    """Codes times values and what the maxima gather, as
    :func:`mmptq.quantizers.demax.product` says it of real values.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, 2, rows, length, generator=generator)
    probabilities = (scores.round() if ties else scores).softmax(-1)
    values = torch.randn(2, 2, length, 3, generator=generator)
    left = DeMaxQuantizer(bits, maxima, side)
    left.set(**left.observed([probabilities]))
    op = equip(QuantMatMul(), left=left, right=covering(values, bits))
    result = IntegerMatMul(op)(probabilities, values)
    expected = product(
        left.encode(probabilities, **left.params), op.quantizer('right')(values)
    )
    assert torch.allclose(
        result, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    assert torch.allclose(
        result,
        op(probabilities, values),
        rtol=1e-5,
        atol=1e-5 * float(expected.abs().max()),
    )


@pytest.mark.parametrize('width', range(2, 9))
@pytest.mark.parametrize('strict', [False, True])
def test_adalog_products_are_those_of_the_simulation(width, strict):
    probabilities, values = torch.randn(2, 2, 5, 7).softmax(-1), torch.randn(2, 2, 7, 3)
    probabilities[..., 0, :3] = 0
    op = equip(
        QuantMatMul(),
        left=adalog(width, 30, 0.9, strict=strict),
        right=covering(values, width),
    )
    layer = IntegerMatMul(op)
    assert 'AdaLog' in layer.path
    near(layer(probabilities, values), op(probabilities, values))


def near(result, expected, tolerance=1e-6):
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert float((result.double() - expected.double()).norm()) <= tolerance * float(
        expected.double().norm()
    )


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('width', [2, 4, 8])
@pytest.mark.parametrize(
    'kind', ['plain', 'rescale', 'gelu_shift', 'adalog', 'adalog_shift', 'per tensor']
)
def test_layers_are_those_of_the_simulation(kind, width, bias, monkeypatch):
    """Bias and what a rescale adds to it, AdaLog's tables; with oneDNN and without."""
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    float_layer = nn.Linear(24, 17, bias)
    op = rescaled(
        float_layer,
        {'rescale': Rescale, 'gelu_shift': GeluShift, 'adalog_shift': GeluShift}.get(
            kind
        ),
    )
    x = nn.functional.gelu(x) if 'shift' in kind or kind == 'adalog' else x
    read = x if op.rescale is None else op.rescale(x)
    weight = op.weight if op.rescale is None else op.rescale.weight(op.weight)
    equip(
        op,
        input=(
            adalog(width, 25, float(read.max()))
            if 'adalog' in kind
            else covering(read, width)
        ),
        weight=covering(weight, width, axis=None if kind == 'per tensor' else -2),
    )
    with torch.no_grad():
        for _ in range(2):
            layer = integer_linear(op)
            near(layer(x), op(x))
            near(
                layer.multiply(layer.encode(x[0]), gelu=True),
                nn.functional.gelu(op(x[0])),
            )
            monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: False)


@pytest.mark.parametrize('onednn', [False, pytest.param(True, marks=needs_vnni)])
@pytest.mark.parametrize(
    'inner, out, weight_zero', [(6, 9, 8), (6, 9, 200), (9, 6, 200)]
)
def test_what_becomes_of_sums_in_the_same_call(
    inner, out, weight_zero, onednn, monkeypatch
):
    """Steps about a zero point, codes of GELU, and addition, against numpy; one weight,
    one of two parts, one with sums of the codes.
    """
    if not onednn:
        monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: False)
    generator = np.random.default_rng(inner)
    x, weight = (
        numbers(generator, 8, 40, inner),
        weights(generator, [weight_zero] * out, 8, out, inner),
    )
    op = linear(weight, [weight_zero] * out, 8, 100, 8)
    op.bias = nn.Parameter(torch.linspace(-50, 50, out))
    layer = integer_linear(op)
    codes = layer.encode(tensor(x))
    expected = integers(x, 100, 8) @ weight.T + op.bias.detach().double().numpy()
    spread = np.abs(expected).max(0)
    factor, zero = 200 / spread, np.arange(out) * 20.0
    steps = layer.in_steps(torch.tensor(factor).float(), torch.tensor(zero).float())(
        codes
    ).numpy()
    wanted = expected * factor + zero
    clear = np.abs(wanted - np.floor(wanted) - 0.5) > 1e-3
    assert clear.mean() > 0.9 and len(np.unique(steps)) > 40 and steps.dtype == np.uint8
    np.testing.assert_array_equal(
        steps[clear], np.clip(np.round(wanted), 0, 255)[clear]
    )
    total = torch.full((41, out), 3.0)
    layer.add_to(total[1:], codes)
    np.testing.assert_allclose(
        total.detach().numpy(),
        np.concatenate([np.full((1, out), 3.0), expected + 3]),
        rtol=1e-5,
        atol=1e-3,
    )
    double = torch.zeros(40, out, dtype=torch.float64)
    layer.add_to(double, codes)
    np.testing.assert_allclose(double.detach().numpy(), expected, rtol=1e-5, atol=1e-3)
    if layer.at_once:
        scale, levels = float(spread.max()) / 12, 16
        coder = Uniform(
            torch.tensor(1 / scale), torch.tensor(2.0), levels - 1, torch.tensor(scale)
        )
        wanted = torch.nn.functional.gelu(torch.tensor(expected)).numpy() / scale
        clear = np.abs(wanted - np.floor(wanted) - 0.5) > 1e-3
        np.testing.assert_array_equal(
            layer.gelu_in_steps(coder, None)(codes).numpy()[clear],
            np.clip(np.round(wanted) + 2, 0, 15)[clear],
        )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_go_in_and_come_out(dtype):
    """Values that all of them hold: half precision is encoded as what it is."""
    op = linear(np.array([[1, -2, 3], [4, 5, -6]]), [8, 8], 4, 7, 4)
    x = torch.tensor([[1, -2, 30], [0.5, 3, 1.5]], dtype=dtype)
    assert (
        torch.equal(integer_linear(op)(x), op(x.float()).to(dtype))
        and integer_linear(op)(x).dtype == dtype
    )
    product = equip(QuantMatMul(), left=whole(1, 7, 4), right=whole(1, 7, 4))
    expected = product(x.float()[None, None], x.float().t()[None, None]).to(dtype)
    assert torch.equal(
        IntegerMatMul(product)(x[None, None], x.t()[None, None]), expected
    )


def test_no_rows_and_no_images():
    layer = integer_linear(linear(np.ones((5, 3), int), [0] * 5, 4, 0, 4))
    assert layer(torch.empty(0, 7, 3)).shape == (0, 7, 5) and layer(
        torch.empty(2, 0, 3)
    ).shape == (2, 0, 5)
    assert layer(torch.ones(3)).shape == (5,)  # one row without a batch
    product = IntegerMatMul(
        equip(QuantMatMul(), left=whole(1, 0, 4), right=whole(1, 0, 4))
    )
    assert product(torch.empty(0, 2, 3, 4), torch.empty(0, 2, 4, 5)).shape == (
        0,
        2,
        3,
        5,
    )


@needs_vnni
def test_a_convolution_names_a_batch_of_no_images_and_takes_views():
    op = equip(
        QuantConv2d.from_float(nn.Conv2d(3, 4, 3, padding=1)),
        input=whole(0.1, 8, 4),
        weight=whole(0.01, 8, 4),
    )
    layer = integer_conv(op)
    with pytest.raises(QuantizationError, match='batch of 0 images'):
        layer(torch.empty(0, 3, 8, 8))
    x = torch.randn(2, 9, 11, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        near(layer(x), op(x))
        near(layer(x[:, :, ::2]), op(x[:, :, ::2]))
        assert layer(x.half()).dtype == torch.float16


def test_what_has_no_integer_form_says_why(monkeypatch):
    weight, conv = whole(0.1, 8, 4), nn.Conv2d(3, 4, 3)
    for quantizer, part in (
        (Float(8), 'its input is float'),
        (whole(0.1, [8] * 3, 4, axis=-1), 'a scale for each channel'),
    ):
        with pytest.raises(NoIntegerForm, match=part):
            integer_linear(equip(QuantLinear(3, 5), input=quantizer, weight=weight))
    with pytest.raises(NoIntegerForm, match='its weight is float'):
        integer_linear(equip(QuantLinear(3, 5), input=weight, weight=Float(8)))
    with pytest.raises(NoIntegerForm, match='product of'):
        IntegerMatMul(equip(QuantMatMul(), left=weight, right=adalog(4, 37)))
    with pytest.raises(NoIntegerForm, match='product of'):
        IntegerMatMul(equip(QuantMatMul(), left=Float(8), right=weight))
    with pytest.raises(NoIntegerForm, match='AdaLog before a convolution'):
        integer_conv(
            equip(QuantConv2d.from_float(conv), input=adalog(4, 37), weight=weight)
        )
    monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: False)
    with pytest.raises(NoIntegerForm, match='oneDNN'):
        integer_conv(equip(QuantConv2d.from_float(conv), input=weight, weight=weight))


def test_compiled_and_not_the_codes_are_the_same(monkeypatch):
    """One real compilation; rows of any number afterwards."""
    if not any(kernels.shutil.which(name) for name in ('g++', 'clang++')):
        pytest.skip('needs a C++ compiler')
    layer = integer_linear(
        equip(
            rescaled(nn.Linear(24, 17), Rescale),
            input=whole(0.05, 100, 8),
            weight=whole(0.01, 128, 8),
        )
    )
    inputs = [
        torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows))
        for rows in (5, 130, 1)
    ]
    plain = [layer.encode(x) for x in inputs]
    monkeypatch.setattr(kernels, 'has_compiler', lambda: True)
    moved = [
        int((layer.encode(x) != codes).sum())
        for x, codes in zip(inputs, plain, strict=True)
    ]
    assert (
        sum(moved) <= 1
    )  # a fused multiplication and subtraction rounds once where two round twice


@needs_vnni
@pytest.mark.parametrize(
    'channels, kernel, size',
    [(3, 4, (64, 4)), (3, 16, (80, 16)), (16, 8, (40, 48)), (8, 16, (64, 64))],
)
def test_convolutions_that_onednn_gets_wrong_are_not_left_to_it(channels, kernel, size):
    """With AMX: outputs of one column, and some kernels as wide as their stride, which
    stay simulated there.
    """
    torch.manual_seed(0)
    op = QuantConv2d.from_float(nn.Conv2d(channels, 64, kernel, kernel))
    equip(op, input=whole(0.02, 117, 8), weight=whole(0.002, 128, 8))
    x = torch.randn(1, channels, *size)
    expected = op(x)
    try:
        result = integer_conv(op)(x)
    except NoIntegerForm as reason:
        assert 'exact' in str(reason) and channels > 3
    else:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
