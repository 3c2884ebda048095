"""What all quantizers share: identity, parameters, checkpoints, the fast way and the way by codes."""
import pytest
import torch
from torch import nn

from mmptq.layers import QuantLinear
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer

from ..conftest import adalog, covering, equip, uniform

CALIBRATED = {
    'uniform': lambda: uniform(-1.3, 2.1),
    'uniform heads': lambda: uniform([-1.0, -2.0, -0.1], [1.0, 0.0, 3.0], 6, -3),
    'adalog': lambda: adalog(4, 30, 1.7),
    'adalog strict': lambda: adalog(3, 53, strict=True),
    'adalog shift': lambda: adalog(5, 20, 2.0, shift=0.17),
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
    assert out.shape == x.shape == codes.shape and out.dtype == torch.float32 and codes.dtype == torch.int16
    assert torch.equal(out, by_codes(quantizer, x))
    assert torch.equal(x, before)
    assert x.numel() == 0 or not torch.equal(out, x)


@pytest.mark.parametrize(('shape', 'axis'), [((300, 400), -2), ((60, 40, 8, 8), -4), ((5, 300, 90), -2), ((40, 2000), -1),
                                             ((3, 30000), -1)])
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
    same = (out.float() - quantizer(x.float())).abs() <= 0.01 * out.float().abs() + 1e-3  # not where rounding tips over
    assert same.double().mean() > 0.9


def test_scalars():
    for quantizer in (uniform(-1, 1), adalog(4, 37)):
        x = torch.tensor(0.3)
        assert quantizer(x).shape == () and torch.equal(quantizer(x), quantizer(x[None])[0])


@pytest.mark.parametrize('quantizer', [UniformQuantizer(4), UniformQuantizer(4, axis=-2), AdaLogQuantizer(4)], ids=repr)
def test_without_parameters_it_is_the_identity(quantizer):
    x = torch.randn(3, 4, requires_grad=True)
    assert quantizer.params is None and quantizer.state_dict() == {}
    assert quantizer(x) is x


@pytest.mark.parametrize('cls', [UniformQuantizer, AdaLogQuantizer])
@pytest.mark.parametrize('bits', [1, 9, 0, -4, True, 4.0, '4', None])
def test_bits_are_integers_from_2_to_8(cls, bits):
    with pytest.raises(ValueError, match=f'not {bits!r}'):
        cls(bits)


def test_axis_counts_from_the_end():
    with pytest.raises(ValueError, match='must be negative, not 0'):
        UniformQuantizer(4, axis=0)


@pytest.mark.parametrize('params', [
    dict(scale=torch.tensor(1.0)),
    dict(zero_point=torch.tensor(1)),
    dict(scale=torch.tensor(1.0), zero_point=torch.tensor(1), q=torch.tensor(1.0)),
    dict(scale=torch.tensor(1.0), zero=torch.tensor(1)),
    dict(scale=torch.tensor(float('nan')), zero_point=torch.tensor(1)),
    dict(scale=torch.tensor([1.0, float('inf')]), zero_point=torch.tensor([1, 1])),
])
def test_set_takes_all_parameters_and_only_finite_ones(params):
    quantizer = UniformQuantizer(4)
    with pytest.raises(ValueError, match=r'takes the parameters|is not finite'):
        quantizer.set(**params)


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
    assert quantizer.params is None and quantizer(x) is x and quantizer.state_dict() == {}


def test_groups_have_a_row_each():
    x = torch.arange(24.0).view(2, 3, 4)
    assert UniformQuantizer(4).grouped(x).shape == (1, 24)
    quantizer = UniformQuantizer(4, axis=-2)
    grouped = quantizer.grouped(x)
    assert grouped.shape == (3, 8)
    assert all(torch.equal(grouped[row].sort().values, x[:, row].flatten().sort().values) for row in range(3))
    assert quantizer.ungrouped(grouped.amax(1)).shape == (3, 1)
    assert quantizer.ungrouped(torch.zeros(7, 3)).shape == (7, 3, 1)


# Checkpoints.

def linear(calibrated):
    torch.manual_seed(3)
    op = QuantLinear.from_float(nn.Linear(6, 4))
    if calibrated:
        return equip(op, input=adalog(4, 20, 2.0, shift=0.17), weight=covering(op.weight, 4, -2))
    return equip(op, input=AdaLogQuantizer(4, shift=0.17), weight=UniformQuantizer(4, axis=-2))


def test_a_state_dict_gives_an_uncalibrated_quantizer_its_parameters():
    saved, x = nn.Sequential(linear(True)), torch.randn(5, 6)
    loaded = nn.Sequential(linear(False))
    state = saved.state_dict()
    assert set(state) == {'0.weight', '0.bias', '0.input_quantizer.scale', '0.input_quantizer.q', '0.weight_quantizer.scale',
                          '0.weight_quantizer.zero_point'}
    loaded.load_state_dict(state, strict=True)
    assert torch.equal(loaded(x), saved(x))
    expected = saved(x)
    state['0.weight_quantizer.scale'].fill_(100)
    assert torch.equal(loaded(x), expected)


def test_a_float_state_dict_leaves_it_the_identity():
    op, x = linear(False), torch.randn(5, 6)
    torch.manual_seed(4)
    float_layer = nn.Linear(6, 4)
    op.load_state_dict(float_layer.state_dict(), strict=True)
    assert all(quantizer.params is None for quantizer in op.quantizers().values())
    assert torch.equal(op(x), float_layer(x))


def test_a_float_state_dict_does_not_pass_as_a_quantized_one():
    with pytest.raises(RuntimeError, match=r'weight_quantizer\.scale'):
        linear(True).load_state_dict(nn.Linear(6, 4).state_dict(), strict=True)


def test_parameters_move_with_the_module():
    op = linear(True).to(torch.float64)
    assert op.input_quantizer.scale.dtype == op.weight_quantizer.scale.dtype == torch.float64
    assert op(torch.randn(5, 6, dtype=torch.float64)).dtype == torch.float64


def test_loaded_parameters_are_on_the_device_of_the_module():
    op = linear(False).to('meta')
    op.load_state_dict(linear(True).state_dict())
    assert op.weight_quantizer.scale.device == op.weight.device
