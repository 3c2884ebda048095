"""Stages: one look at a block for all of them, in their order, and back where one does
not help.
"""

import pytest
import torch
from torch import nn

from mmptq.calibration import Block, Call, Needs, calibrate, operations, run_stages
from mmptq.calibration.stage import as_stages, propagates
from mmptq.layers import QuantLinear
from mmptq.methods import BRECQ, AdaLog, AdaLogBRECQ, MinMax, UQViT
from mmptq.registry import METHODS, registered

from ..conftest import FAST, equip


class Two(nn.Module):
    """Two blocks of a layer each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = equip(QuantLinear.from_float(nn.Linear(4, 4)))
        self.second = equip(QuantLinear.from_float(nn.Linear(4, 4)))

    def forward(self, x):
        return self.second(self.first(x))


def calls(count=3, rows=20):
    generator = torch.Generator().manual_seed(1)
    return [Call((torch.randn(rows, 4, generator=generator),)) for _ in range(count)]


def block_of(count=3):
    module = Two()
    return Block('two', module, calls(count), operations(module))


class Noted:
    """A stage that notes what it is shown, and helps or not."""

    def __init__(self, needs=None, helps=True, change=None):
        self.needs = needs or Needs()
        self.helps, self.change, self.seen = helps, change, []

    def calibrate(self, block):
        self.seen.append((dict(block.samples), dict(block.extremes), list(block.order)))
        if self.change:
            self.change(block)
        return self.helps


def test_needs_are_joined_to_what_serves_all():
    joined = Needs(rows=5, channels=2) | Needs(rows=3, channels=9, extremes=True)
    assert (
        joined == Needs(rows=5, channels=9, extremes=True)
        and Needs() | Needs() == Needs()
    )


def test_a_block_is_observed_once_for_all_stages():
    block, ran = block_of(), []
    block.module.register_forward_hook(lambda *_: ran.append(1))
    stages = [Noted(Needs(rows=10)), Noted(Needs(rows=60, extremes=True)), Noted()]
    run_stages(block, stages)
    assert len(ran) == 3  # once a call
    for stage in stages:
        ((samples, extremes, order),) = stage.seen
        assert order == ['first', 'second'] and len(samples['first'][0][0]) == 60
        x = torch.cat([call.args[0] for call in block.calls])
        low, high = extremes['first', 'input']
        assert (low, high) == (x.min(), x.max())
    assert all(
        torch.equal(*pair)
        for pair in zip(block.targets, block.run_float(), strict=True)
    )


def spoil(block):
    for name, op in block.ops.items():
        block.set_weight(name, 3 * op.weight.detach())
        block.set_bias(name, op.bias.detach() + 1)
        op.input_quantizer.set(
            scale=torch.tensor(9.0), zero_point=torch.tensor(0, dtype=torch.int32)
        )


@pytest.mark.parametrize('before', [[], [MinMax()], [MinMax(), Noted(change=spoil)]])
def test_a_stage_that_does_not_help_is_taken_back(before):
    expected, block = block_of(), block_of()
    needed = Noted(Needs(rows=5))
    run_stages(expected, [*before, needed])
    run_stages(block, [*before, Noted(Needs(rows=5), helps=False, change=spoil)])
    state, wanted = block.state(), expected.state()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in state)
    a, b = block.module.state_dict(), expected.module.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert block.float_parameters.keys() == expected.float_parameters.keys()


class OldMethod:
    """A method as users wrote them before there were stages."""

    def __init__(self, propagate_error=False):
        self.propagate_error = propagate_error

    def calibrate(self, block):
        found = {}

        def visit(name, op, activations):
            found.setdefault(name, []).append(op.operands(*activations))

        outputs = block.observe(100, visit)
        for name, operands in found.items():
            for role, values in zip(
                block.ops[name].roles, zip(*operands, strict=True), strict=True
            ):
                quantizer = block.ops[name].quantizer(role)
                every = torch.cat([quantizer.grouped(value) for value in values], 1)
                params = quantizer.range_params(every.amin(1), every.amax(1))
                quantizer.set(
                    **{key: quantizer.ungrouped(value) for key, value in params.items()}
                )
        return outputs


@pytest.mark.parametrize('propagate', [False, True])
def test_a_method_of_the_old_protocol_goes_on_working(propagate):
    old, new = Two(), Two()
    found = calibrate(old, ['first', 'second'], calls(), OldMethod(propagate))
    wanted = calibrate(
        new, ['first', 'second'], calls(), [MinMax(rows=100)], propagate_error=propagate
    )
    for one, other in zip(found, wanted, strict=True):
        assert one.params.keys() == other.params.keys() and one.sqnr_db == other.sqnr_db
        assert all(
            torch.equal(one.params[key], other.params[key]) for key in one.params
        )


def test_a_stage_may_follow_a_method_of_the_old_protocol():
    old, both = block_of(), block_of()
    run_stages(old, OldMethod())
    run_stages(both, [OldMethod(), BRECQ(iterations=30, batch=3, weight_lr=0.2)])
    errors = [
        sum(
            float((output - target).square().sum())
            for output, target in zip(block.run(), block.targets, strict=True)
        )
        for block in (old, both)
    ]
    assert errors[1] < errors[0] and both.float_parameters


def test_a_stage_may_prepare_the_float_network():
    class Doubling(MinMax):
        def prepare(self, model, spec, calls):
            with torch.no_grad():
                model.first.weight.mul_(2)
                model.first.bias.mul_(2)
                model.second.weight.mul_(0.5)

    module = Two()
    expected = [module(call.args[0]).detach() for call in calls()]
    shown = []
    calibrate(
        module, ['first', 'second'], calls(), Doubling(),
        on_calls=lambda block: shown.append(block.calls[0].args[0].clone()),
    )  # fmt: skip
    for op in (module.first, module.second):
        for quantizer in op.quantizers().values():
            quantizer.clear()
    assert torch.equal(shown[1], module.first(calls()[0].args[0]))
    for call, output in zip(calls(), expected, strict=True):
        torch.testing.assert_close(module(call.args[0]), output)


def test_short_names_and_what_they_propagate():
    pair = AdaLogBRECQ(**FAST, iterations=7, propagate_error=True)
    search, learning = as_stages(pair)
    assert search == AdaLog(**FAST, propagate_error=True) and learning == BRECQ(
        iterations=7
    )
    assert as_stages([UQViT(), BRECQ()]) == [UQViT(), BRECQ()]
    answers = [
        propagates(x) for x in (pair, AdaLog(), UQViT(), [UQViT(), BRECQ()], [MinMax()])
    ]
    assert answers == [True, False, True, True, False]


def test_stages_are_found_by_their_names():
    assert registered(METHODS, 'BRECQ') is registered(METHODS, 'mmptq.BRECQ') is BRECQ
