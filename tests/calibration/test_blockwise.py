"""The calibration of small real backbones, end to end."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.backbones import find_spec
from mmptq.calibration import Call, calibrate, operations
from mmptq.calibration.blockwise import sqnr_db
from mmptq.layers import QuantLinear
from mmptq.methods import AdaLog, MinMax

from ..conftest import SWIN, VIT, covering, equip, image, oracle_of, quantizable, quantizers_of, uniform

FAST = dict(candidates=9, rows=64)


def inputs():
    return [Call((image(45, 57, seed=1),)), Call((image(32, 70, seed=2),))]


def names_of(backbone):
    return find_spec(backbone).block_names(backbone)


def calibrated(scope, cfg, method, **options):
    """A calibrated backbone and the results."""
    backbone = quantizable(scope, cfg)
    return backbone, calibrate(backbone, names_of(backbone), inputs(), method, **options)


@torch.no_grad()
def outputs(backbone):
    return [out for call in inputs() for out in backbone(*call.args)]


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('propagate', [False, True])
@pytest.mark.parametrize('method', [MinMax, AdaLog])
def test_everything_is_calibrated(family, method, propagate):
    options = FAST if method is AdaLog else {}
    backbone, results = calibrated(*family, method(**options, propagate_error=propagate))
    assert all(quantizer.params is not None for quantizer in quantizers_of(backbone).values())
    assert [result.name for result in results] == names_of(backbone)
    assert {name for result in results for name in result.sqnr_db} == set(operations(backbone))
    assert {name for result in results for name in result.params} == {name for name in backbone.state_dict() if '_quantizer.' in name}
    assert all(5 < value < 60 for result in results for value in result.sqnr_db.values())
    for quantized, plain in zip(outputs(backbone), outputs(quantizable(*family)), strict=True):
        error = (quantized - plain).norm() / plain.norm()
        assert 1e-4 < error < 1


def test_a_seed_decides(family):
    first, again, other = (calibrated(*family, AdaLog(candidates=9, rows=4), seed=seed)[0] for seed in (0, 0, 1))
    assert equal(first, again) and not equal(first, other)


def test_weights_stay(family):
    backbone, plain = calibrated(*family, MinMax())[0], quantizable(*family)
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in plain.state_dict().items())
    assert not backbone.training and all('forward' not in vars(module) for module in backbone.modules())


def test_checkpoints_hold_the_calibration(family):
    backbone, fresh = calibrated(*family, MinMax())[0], quantizable(*family)
    fresh.load_state_dict(backbone.state_dict(), strict=True)
    assert all(torch.equal(*pair) for pair in zip(outputs(fresh), outputs(backbone), strict=True))


# Taking up an interrupted run.

class Forbidden(Exception):
    pass


class OnlyAfter:
    """A method that may not be asked about blocks that are done."""

    def __init__(self, method, done):
        self.method, self.done, self.asked = method, done, []
        self.propagate_error = method.propagate_error

    def calibrate(self, block):
        if block.name in self.done:
            raise Forbidden(block.name)
        self.asked.append(block.name)
        return self.method.calibrate(block)


@pytest.mark.parametrize('count', [1, 3, None])
@pytest.mark.parametrize('propagate', [False, True])
@pytest.mark.parametrize(('scope', 'cfg'), [('mmdet', SWIN), ('mmseg', VIT)], ids=['swin', 'vit'])
def test_blocks_that_are_done_are_taken_over(scope, cfg, propagate, count):
    method = AdaLog(**FAST, propagate_error=propagate)
    whole, results = calibrated(scope, cfg, method)
    done = {result.name: result for result in results[:count]}
    only_after = OnlyAfter(method, done)
    resumed, again = calibrated(scope, cfg, only_after, done=done)
    assert equal(whole, resumed) and only_after.asked == names_of(whole)[len(done):]
    assert [(result.name, result.sqnr_db) for result in again] == [(result.name, result.sqnr_db) for result in results]


def test_progress_is_told(family):
    shown, told = [], []
    _, results = calibrated(*family, MinMax(), on_calls=lambda block: shown.append((block.name, len(block.calls), len(told))),
                            on_block=told.append)
    assert shown == [(result.name, 2, number) for number, result in enumerate(results)] and told == results


# What does not go.

@pytest.mark.parametrize('bad', [float('nan'), float('-inf')])
def test_a_weight_that_is_not_finite_is_named(family, bad):
    backbone = quantizable(*family)
    name = f'{names_of(backbone)[-1]}.ffn.layers.1.weight'
    with torch.no_grad():
        backbone.get_parameter(name)[0, 0] = bad
    with pytest.raises(QuantizationError, match=name.replace('.', r'\.')):
        calibrate(backbone, names_of(backbone), inputs(), MinMax())
    assert all(quantizer.params is None for quantizer in quantizers_of(backbone).values())


def test_an_image_that_is_not_finite_names_the_layer(family):
    backbone = quantizable(*family)
    calls = inputs()
    calls[1].args[0][0, 1, 5, 5] = float('nan')
    with pytest.raises(QuantizationError, match=r'patch_embed\.projection receives activations that are NaN'):
        calibrate(backbone, names_of(backbone), calls, MinMax())


def test_an_empty_set_is_refused(family):
    backbone = quantizable(*family)
    with pytest.raises(QuantizationError, match='calibration set is empty'):
        calibrate(backbone, names_of(backbone), [], MinMax())


# What the next block sees.

@torch.no_grad()
def ordinary(backbone):
    """First arguments of every block in ordinary forwards."""
    seen = {name: [] for name in names_of(backbone)}
    handles = [backbone.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
               for name in seen]
    outputs(backbone)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize('method', [MinMax, AdaLog])
@pytest.mark.parametrize('propagate', [False, True])
def test_the_next_block_sees_float_or_quantized_outputs(family, propagate, method):
    calls = {}
    backbone, _ = calibrated(*family, method(**(FAST if method is AdaLog else {}), propagate_error=propagate),
                             on_calls=lambda block: calls.update({block.name: [call.args[0].clone() for call in block.calls]}))
    quantized, plain = ordinary(backbone), ordinary(quantizable(*family))
    for number, name in enumerate(calls):
        as_quantized, as_float = (all(torch.equal(*pair) for pair in zip(calls[name], reference[name], strict=True))
                                  for reference in (quantized, plain))
        assert (as_quantized, as_float) == ((True, True) if number == 0 else (propagate, not propagate)), name


# Signal to noise.

def test_sqnr_by_hand():
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    op = QuantLinear.from_float(nn.Linear(6, 4))
    equip(op, input=covering(x, 4), weight=covering(op.weight, 3, -2))
    x_q, w_q, w, b = (t.astype(np.float64) for t in (oracle_of(op.input_quantizer, x.numpy()),
                      oracle_of(op.weight_quantizer, op.weight.detach().numpy()), op.weight.detach().numpy(), op.bias.detach().numpy()))
    target = x.double().numpy() @ w.T + b
    expected = 10 * math.log10((target**2).sum() / ((x_q @ w_q.T + b - target)**2).sum())
    assert sqnr_db(op, [(x[:10],), (x[10:],)]) == pytest.approx(expected, rel=1e-4)


def test_sqnr_of_no_noise_is_none():
    op = equip(QuantLinear(6, 4))
    assert sqnr_db(op, [(torch.randn(5, 6),)]) is None


@pytest.mark.parametrize('high', [3, 2.2])
def test_sqnr_of_no_signal_is_none(high):
    """Products that cancel; with a range of [0, 2.2] quantized ones do not."""
    op = equip(QuantLinear(2, 1), input=uniform(0, high, 2))
    with torch.no_grad():
        op.weight.copy_(torch.tensor([[2, -1]]))
        op.bias.zero_()
    x = torch.tensor([[1.0, 2]])
    assert (op.quantized(x) == 0).item() == (high == 3)
    assert sqnr_db(op, [(x,)]) is None
