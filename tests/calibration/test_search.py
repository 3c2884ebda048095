"""The search against brute force in numpy."""
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmptq.calibration import search
from mmptq.layers import QuantConv2d, QuantLinear, QuantMatMul
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer

from ..conftest import adalog, covering, equip, oracle_of


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape, seed=0):
    """Values with outliers, for which the extremes are a bad range."""
    return random(*shape, seed=seed)**3


def linear(inputs=None, weight=None):
    torch.manual_seed(0)
    op = equip(QuantLinear.from_float(nn.Linear(12, 5)), input=inputs, weight=weight or UniformQuantizer(3, axis=-2))
    with torch.no_grad():
        op.weight.copy_(heavy(5, 12, seed=3))
    return op, [(heavy(40, 12, seed=1),), (heavy(25, 12, seed=2),)]


def conv(**options):
    torch.manual_seed(0)
    op = equip(QuantConv2d.from_float(nn.Conv2d(4, 6, 3, **options)), weight=UniformQuantizer(3, axis=-4))
    return op, [op.sample(op.activations(heavy(2, 4, 9, 9, seed=1)), 50, torch.Generator().manual_seed(0))]


def matmul(left, right, probabilities=False):
    op = equip(QuantMatMul(), left=left, right=right)
    tensors = [(heavy(3, 2, 7, 4, seed=1), heavy(3, 2, 4, 7, seed=2)), (heavy(2, 2, 5, 4, seed=3), heavy(2, 2, 4, 5, seed=4))]
    if probabilities:
        tensors = [((2 * a @ b).softmax(-1), b.mT) for a, b in tensors]
    return op, tensors


def heads(bits=3):
    return UniformQuantizer(bits, axis=-3)


CASES = {
    'linear weight': (lambda: linear(), 'weight'),
    'linear weight, quantized input': (lambda: linear(inputs=covering(heavy(40, 12, seed=1), 3)), 'weight'),
    'linear weight, one range': (lambda: linear(weight=UniformQuantizer(3)), 'weight'),
    'linear input': (lambda: linear(inputs=UniformQuantizer(3), weight=covering(heavy(5, 12, seed=3), 4, -2)), 'input'),
    'linear input, adalog': (lambda: linear(inputs=AdaLogQuantizer(3, shift=0.2)), 'input'),
    'conv weight': (lambda: conv(padding=1, stride=2), 'weight'),
    'conv weight, groups': (lambda: conv(groups=2), 'weight'),
    'conv input': (lambda: conv(), 'input'),
    'queries': (lambda: matmul(heads(), heads()), 'left'),
    'keys': (lambda: matmul(covering(heavy(3, 2, 7, 4, seed=1), 3, -3), heads()), 'right'),
    'probabilities': (lambda: matmul(AdaLogQuantizer(3, fixed_scale=1.0), heads(), True), 'left'),
    'probabilities, uniform': (lambda: matmul(UniformQuantizer(3), heads(), True), 'left'),
    'values': (lambda: matmul(adalog(3, 30), heads(), True), 'right'),
}


def compute(op, operands):
    """The operation in float64."""
    operands = [torch.from_numpy(np.asarray(x, np.float64)) for x in operands]
    if op.kind == 'matmul':
        return np.matmul(*(x.numpy() for x in operands))
    bias = op.bias.detach().double()
    if op.kind == 'linear':
        return np.einsum('ti,oi->to', *(x.numpy() for x in operands)) + bias.numpy()
    return F.conv2d(*operands, bias, op.stride, 0, op.dilation, op.groups).numpy()


def groups(op, quantizer, role, errors):
    """Squared errors summed for each channel or head of the quantizer, or all."""
    if quantizer.axis is None:
        return np.array([errors.sum()])
    axis = {'linear': 1, 'conv': 1, 'matmul': 1}[op.kind]
    return errors.sum(tuple(d for d in range(errors.ndim) if d != axis))


def brute_force(op, role, samples, params):
    """Error of the output, by group, with an operand's quantizer at given parameters; the others as they are."""
    index = op.roles.index(role)
    total = 0
    for activations in samples:
        operands = [x.detach().numpy() for x in op.operands(*activations)]
        present = [oracle_of(q, x) if q.params else x for q, x in zip(op.quantizers().values(), operands, strict=True)]
        quantizer = type(op.quantizer(role)).__new__(type(op.quantizer(role)))
        quantizer.__dict__ = {**op.quantizer(role).__dict__, '_buffers': dict(params)}
        present[index] = oracle_of(quantizer, operands[index])
        total = total + groups(op, quantizer, role, (compute(op, present) - compute(op, operands))**2)
    return total


def grid(op, role, samples, count):
    """The candidates, each in the shape of the quantizer's parameters."""
    quantizer, index = op.quantizer(role), op.roles.index(role)
    values = [quantizer.grouped(op.operands(*activations)[index].detach()) for activations in samples]
    stacked = quantizer.candidates(values[0] if role == 'weight' else torch.cat(values, 1), count)
    for number in range(len(next(iter(stacked.values())))):
        yield {name: quantizer.ungrouped(value[number]) for name, value in stacked.items()}


@pytest.mark.parametrize('case', CASES)
def test_search_finds_the_least_output_error(case):
    make, role = CASES[case]
    op, samples = make()
    errors = np.array([brute_force(op, role, samples, params) for params in grid(op, role, samples, 25)])
    others = {name: quantizer.params for name, quantizer in op.quantizers().items() if name != role}
    search(op, role, samples, 25)
    found = brute_force(op, role, samples, op.quantizer(role).params)
    np.testing.assert_allclose(found, errors.min(0), rtol=1e-4)
    assert len(found) == (1 if op.quantizer(role).axis is None else op.compute(*op.operands(*samples[0])).shape[1])
    assert (errors.max(0) > 1.05 * errors.min(0)).all()
    assert all(quantizer.params is others[name] or quantizer.params.keys() == others[name].keys()
               for name, quantizer in op.quantizers().items() if name != role)


@pytest.mark.parametrize('case', [case for case in CASES if 'adalog' not in case and case != 'probabilities'])
def test_search_is_never_worse_than_the_extremes(case):
    make, role = CASES[case]
    op, samples = make()
    index = op.roles.index(role)
    quantizer = op.quantizer(role)
    values = torch.cat([quantizer.grouped(op.operands(*a)[index].detach()) for a in samples], 1)
    extremes = covering(values, quantizer.bits, None if quantizer.axis is None else -2)
    params = extremes.params if quantizer.axis is None else {key: quantizer.ungrouped(v[:, 0]) for key, v in extremes.params.items()}
    worst = brute_force(op, role, samples, params)
    search(op, role, samples, 25)
    found = brute_force(op, role, samples, quantizer.params)
    assert (found <= worst * (1 + 1e-6)).all()
    assert quantizer.axis is None or (found < worst * 0.999).any()


@pytest.mark.parametrize('count', [128, 64])
def test_search_of_a_base_is_never_worse_than_log2(count):
    """With powers of two for probabilities log2 is exact."""
    op = equip(QuantMatMul(), left=AdaLogQuantizer(4, fixed_scale=1.0))
    rows = torch.tensor(list(itertools.permutations([0.5, 0.25, 0.125, 0.125])))[None, None]
    search(op, 'left', [(rows, random(1, 1, 4, 3))], count)
    assert torch.equal(op.left_quantizer(rows), rows)


def test_parameters_have_the_shape_of_the_operand():
    op, samples = CASES['conv weight'][0]()
    search(op, 'weight', samples, 16)
    assert op.weight_quantizer.scale.shape == op.weight_quantizer.zero_point.shape == (6, 1, 1, 1)
    assert op.weight_quantizer.zero_point.dtype == torch.int32
    op, samples = CASES['queries'][0]()
    search(op, 'left', samples, 16)
    assert op.left_quantizer.scale.shape == (2, 1, 1)
    op, samples = CASES['probabilities'][0]()
    search(op, 'left', samples, 16)
    assert op.left_quantizer.scale.shape == op.left_quantizer.q.shape == ()


def test_channels_are_searched_by_themselves():
    """A channel's range does not depend on the other channels."""
    op, samples = linear()
    search(op, 'weight', samples, 25)
    for channel in range(5):
        alone = equip(QuantLinear(12, 1), weight=UniformQuantizer(3, axis=-2))
        with torch.no_grad():
            alone.weight.copy_(op.weight[channel:channel + 1])
            alone.bias.copy_(op.bias[channel:channel + 1])
        search(alone, 'weight', samples, 25)
        together = op.weight_quantizer.params
        assert all(torch.equal(value[0], together[name][channel]) for name, value in alone.weight_quantizer.params.items())


def test_weights_and_samples_are_left_as_they_are():
    op, samples = linear()
    before = [op.weight.clone(), samples[0][0].clone()]
    search(op, 'weight', samples, 9)
    assert torch.equal(op.weight, before[0]) and torch.equal(samples[0][0], before[1])
    assert op.weight.requires_grad and op.weight.grad is None
