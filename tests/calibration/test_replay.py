"""Parts of a block that had ended before an operation answer what they gave."""

import pytest
import torch
from torch import nn

from mmptq.backbones import find_spec
from mmptq.calibration import Call, Stream, operations
from mmptq.calibration.replay import replayed
from mmptq.layers import QuantLinear
from mmptq.quantizers import Float

from ..conftest import image, quantizable


def blocks(family):
    """Each block of a small backbone: its name, module and a call."""
    backbone = quantizable(*family)
    names = find_spec(backbone).block_names(backbone)
    stream = Stream(backbone, names, [Call((image(45, 57),))])
    for name in names:
        call, module = stream.calls()[0], backbone.get_submodule(name)
        yield name, module, call
        with torch.no_grad():
            stream.advance([module(*call.args, **call.kwargs)])


def same(a, b):
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (a, b)), strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs
    )


@torch.no_grad()
def test_the_output_is_the_modules_from_any_operation_on(family):
    for _, module, call in blocks(family):
        before = [part.__dict__.get('forward') for part in module.modules()]
        expected = module(*call.args, **call.kwargs)
        for op in operations(module).values():
            with replayed(module, op) as replay:
                assert all(
                    same(replay.run(*call.args, **call.kwargs), expected)
                    for _ in range(3)
                )
        assert before == [part.__dict__.get('forward') for part in module.modules()]


@torch.no_grad()
def test_a_change_of_the_operation_reaches_the_output(family):
    for _, module, call in blocks(family):
        for op in operations(module).values():
            if isinstance(op, QuantLinear):
                with replayed(module, op) as replay:
                    replay.run(*call.args, **call.kwargs)
                    op.weight.mul_(2)
                    changed = replay.run(*call.args, **call.kwargs)
                assert same(changed, module(*call.args, **call.kwargs))
                op.weight.div_(2)
                assert not same(changed, module(*call.args, **call.kwargs))


@torch.no_grad()
def test_what_came_before_runs_once(family):
    """A block's attention for fc1, its first layer for fc2."""
    ran = []
    for name, module, call in blocks(family):
        layers = {
            key: op
            for key, op in operations(module).items()
            if isinstance(op, QuantLinear)
        }
        if len(layers) < 4:
            continue
        handles = [
            op.register_forward_hook(lambda *_, key=key: ran.append(key))
            for key, op in operations(module).items()
        ]
        for number, op in enumerate(layers.values()):
            ran.clear()
            with replayed(module, op) as replay:
                for _ in range(3):
                    replay.run(*call.args, **call.kwargs)
            before = list(layers)[:number]
            inside = {
                key
                for key in operations(module)
                if key.rpartition('.')[0] == list(layers)[number].rpartition('.')[0]
            }
            assert all(ran.count(key) <= 1 or key in inside for key in before), name
            assert all(ran.count(key) == 3 for key in list(layers)[number:])
        for handle in handles:
            handle.remove()


class Twice(nn.Module):
    """A part that runs before and after the operation, and one that contains it."""

    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.inner[0] = QuantLinear.from_float(self.inner[0])
        self.inner[0].set_quantizers({}, {'input': Float(), 'weight': Float()})

    def forward(self, x):
        return self.act(self.inner(self.act(x)) + x)


@torch.no_grad()
@pytest.mark.parametrize('given', ['module', 'function'])
def test_a_part_that_runs_before_and_after(given):
    module, x = Twice(), torch.randn(3, 4)
    op = module.inner[0]
    op.forward = op.float_forward
    expected = module(x)
    called = module if given == 'module' else lambda x: module(x)
    with replayed(called, op) as replay:
        for weight in (op.weight.clone(), torch.eye(4), torch.zeros(4, 4)):
            op.weight.copy_(weight)
            output = replay.run(x)
            torch.testing.assert_close(
                output, torch.tanh(torch.tanh(torch.tanh(x) @ weight.t() + op.bias) + x)
            )
    assert not torch.equal(output, expected)


class InPlace(Twice):
    """Adds to what a part answered, in place."""

    def forward(self, x):
        return self.inner(self.act(x).add_(1))


@torch.no_grad()
def test_an_answer_that_is_changed_in_place_is_not_used_again():
    module, x = InPlace(), torch.randn(3, 4)
    op = module.inner[0]
    op.forward = op.float_forward
    with replayed(module, op) as replay:
        for factor in (1, 2, 3, 4):
            op.weight.copy_(factor * torch.eye(4))
            torch.testing.assert_close(
                replay.run(x), torch.tanh(factor * (torch.tanh(x) + 1) + op.bias)
            )
