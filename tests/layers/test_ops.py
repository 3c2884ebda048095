"""Quantized operations against torch's own, an independent formula, and their samples."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmptq.layers import QuantConv2d, QuantLinear, QuantMatMul
from mmptq.layers.ops import pick
from mmptq.quantizers import UniformQuantizer

from ..conftest import adalog, covering, equip, oracle_of

CONVS = [
    dict(),
    dict(stride=2, bias=False),
    dict(padding=1),
    dict(padding=(2, 1), stride=(2, 3)),
    dict(padding=2, dilation=2),
    dict(padding='same', dilation=(1, 3)),
    dict(padding=1, groups=2),
    dict(padding=1, groups=4, stride=2),
    dict(padding=1, padding_mode='reflect'),
    dict(padding=1, padding_mode='circular', dilation=(2, 1)),
    dict(kernel_size=(1, 4), stride=(1, 4)),
]


def conv(options, out=6):
    torch.manual_seed(0)
    return nn.Conv2d(4, out * options.get('groups', 1), **{'kernel_size': 3, **options})


def calibrated(op, x, bits=4):
    """A linear layer or convolution with its input per tensor, its weight per output channel."""
    return equip(op, input=covering(x, bits), weight=covering(op.weight, bits, op.weight_axis))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def places(rows, full):
    """For every row, the one row of the full output that it is, to rounding."""
    distance = (rows[:, None] - full[None]).abs().amax(-1)
    found = distance.argmin(1)
    assert distance.amin(1).max() < 1e-5
    return found.tolist()


# Float.

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(12,), (5, 12), (2, 7, 12), (2, 3, 4, 12)])
def test_uncalibrated_linear_is_nn_linear(shape, bias):
    layer, x = nn.Linear(12, 5, bias), torch.randn(shape)
    assert torch.equal(equip(QuantLinear.from_float(layer))(x), layer(x))


@pytest.mark.parametrize('options', CONVS, ids=str)
def test_uncalibrated_conv_is_conv2d(options):
    layer, x = conv(options), torch.randn(2, 4, 13, 17)
    op = equip(QuantConv2d.from_float(layer))
    assert torch.equal(op(x), layer(x))
    if layer.padding_mode == 'zeros':
        assert torch.equal(op(x), F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups))


def test_uncalibrated_matmul_is_matmul():
    left, right = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 4, 6)
    assert torch.equal(equip(QuantMatMul())(left, right), left @ right)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kind', ['linear', 'conv'])
def test_parameters_are_shared_and_keep_their_names(kind, bias):
    layer = nn.Linear(4, 5, bias) if kind == 'linear' else nn.Conv2d(4, 5, 3, bias=bias)
    layer.eval()
    layer.weight.requires_grad_(False)
    op = equip((QuantLinear if kind == 'linear' else QuantConv2d).from_float(layer))
    assert op.kind == kind and isinstance(op, type(layer)) and not op.training
    assert op.weight is layer.weight and op.bias is layer.bias
    assert list(op.state_dict()) == list(layer.state_dict())
    assert dict(op.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.randn(2, 4) if kind == 'linear' else torch.randn(1, 4, 5, 5)
    assert torch.equal(op(x), layer(x))


def test_quantizers_are_children_by_role():
    weight = UniformQuantizer(4, axis=-2)
    op = equip(QuantLinear(3, 2), weight=weight)
    assert op.weight_quantizer is op.quantizer('weight') is weight
    assert list(op.quantizers()) == ['input', 'weight'] == [name.removesuffix('_quantizer') for name, _ in op.named_children()]


# Quantized.

def test_quantized_linear_is_the_formula():
    x = torch.randn(7, 9, 12, generator=seeded())
    op = calibrated(QuantLinear.from_float(nn.Linear(12, 5)), x)
    x_q, w_q = oracle_of(op.input_quantizer, x.numpy()), oracle_of(op.weight_quantizer, op.weight.detach().numpy())
    expected = np.einsum('bti,oi->bto', x_q.astype(float), w_q.astype(float)) + op.bias.detach().double().numpy()
    np.testing.assert_allclose(op(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (op(x) - F.linear(x, op.weight, op.bias)).abs().max() > 1e-2


@pytest.mark.parametrize('options', CONVS, ids=str)
def test_quantized_conv_is_the_formula(options):
    x = torch.randn(2, 4, 9, 11, generator=seeded()) + 0.5  # a zero point beside the middle
    op = calibrated(QuantConv2d.from_float(conv(options)), x)
    x_q, w_q = (torch.from_numpy(oracle_of(quantizer, tensor.detach().numpy()))
                for quantizer, tensor in ((op.input_quantizer, x), (op.weight_quantizer, op.weight)))
    plain = conv(options)
    with torch.no_grad():
        plain.weight.copy_(w_q)
        expected = plain(x_q)  # pads after the quantization
    torch.testing.assert_close(op(x), expected, rtol=1e-5, atol=1e-5)
    assert (op(x) - conv(options)(x)).abs().max() > 1e-2


def test_quantized_matmul_is_the_formula():
    left, right = torch.rand(3, 2, 5, 4, generator=seeded()), torch.randn(3, 2, 4, 6, generator=seeded())
    op = equip(QuantMatMul(), left=adalog(4, 30), right=covering(right, 4, -3))
    expected = oracle_of(op.left_quantizer, left.numpy()).astype(float) @ oracle_of(op.right_quantizer, right.numpy()).astype(float)
    np.testing.assert_allclose(op(left, right).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (op(left, right) - left @ right).abs().max() > 1e-2


# Samples.

def test_pick():
    assert pick(100, 7, seeded(), torch.device('cpu')).tolist() == list(range(7))
    found = pick(5, 1000, seeded(), torch.device('cpu')).tolist()
    assert len(set(found)) == 5 and found == sorted(found) and found != pick(5, 1000, seeded(1), torch.device('cpu')).tolist()


@pytest.mark.parametrize(('rows', 'expected'), [(10, 10), (1000, 42)])
@pytest.mark.parametrize('shape', [(42, 8), (2, 21, 8), (2, 3, 7, 8)])
def test_linear_samples_give_rows_of_the_output(shape, rows, expected):
    x = torch.randn(shape, generator=seeded())
    op = calibrated(QuantLinear.from_float(nn.Linear(8, 5)), x)
    sample = op.sample((x,), rows, seeded())
    for compute in (lambda *a: op.compute(*op.operands(*a)), op.quantized):
        found = places(compute(*sample), compute(x).flatten(0, -2))
        assert len(set(found)) == expected


@pytest.mark.parametrize('options', CONVS, ids=str)
@pytest.mark.parametrize('rows', [10, 1000])
def test_conv_samples_give_rows_of_the_output(options, rows):
    x = torch.randn(2, 4, 9, 11, generator=seeded()) + 0.5
    op = calibrated(QuantConv2d.from_float(conv(options)), x, 8)
    activations = op.activations(x)
    sample = op.sample(activations, rows, seeded())
    for compute in (lambda *a: op.compute(*op.operands(*a)), op.quantized):
        full = compute(*activations)
        out = compute(*sample)
        assert out.shape[1:] == (full.shape[1], 1, 1)
        full = full.movedim(1, -1).flatten(0, 2)
        found = places(out.flatten(1), full)
        assert len(found) == min(rows, len(full))
        if compute == op.quantized:  # two receptive fields may be alike
            continue
        assert len(set(found)) == len(found)


@pytest.mark.parametrize('leading', [(6,), (2, 3)])
@pytest.mark.parametrize(('rows', 'windows', 'length'), [(4, 1, 4), (7, 1, 7), (20, 3, 7), (1000, 6, 7)])
def test_matmul_samples_give_rows_of_the_output(leading, rows, windows, length):
    left, right = torch.randn(*leading, 2, 7, 4, generator=seeded()), torch.randn(*leading, 2, 4, 5, generator=seeded(1))
    op = equip(QuantMatMul(), left=covering(left, 4, -3), right=covering(right, 4, -3))
    sample = op.sample((left, right), rows, seeded())
    assert sample[0].shape == (windows, 2, length, 4) and sample[1].shape == (windows, 2, 4, 5)
    for compute in (op.compute, op.quantized):
        full = compute(left, right).reshape(6, 2, 7, 5)
        out = compute(*sample)
        for head in range(2):
            found = places(out[:, head].flatten(0, 1), full[:, head].flatten(0, 1))
            assert len(set(found)) == windows * length


@pytest.mark.parametrize('op', [QuantLinear(8, 5), QuantConv2d(8, 5, 3), QuantMatMul()], ids=lambda op: op.kind)
def test_samples_are_seeded(op):
    activations = {'linear': (torch.randn(300, 8),), 'conv': (torch.randn(2, 8, 20, 20),),
                   'matmul': (torch.randn(40, 2, 9, 4), torch.randn(40, 2, 4, 9))}[op.kind]
    first, again, other = (op.sample(activations, 20, seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
