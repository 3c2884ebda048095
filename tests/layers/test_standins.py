"""One way to stand in for a part of a module, and nothing of it afterwards."""

import pytest
import torch
from torch import nn

from mmptq.layers.standins import StandIn, in_place_of_forward, standing_in


class Doubles(nn.Module):
    """Twice its weight and its buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer('shift', None)

    def factor(self):
        return 2

    def forward(self, x):
        return self.factor() * (
            self.weight * x + (0 if self.shift is None else self.shift)
        )


def test_a_forward_a_method_a_buffer_and_a_parameter_are_replaced_and_restored():
    module, x = Doubles(), torch.ones(2)
    weight = module.weight
    before = weight.data
    for stand_ins, expected in (
        ([in_place_of_forward(module, lambda x: x + 7)], [8, 8]),
        ([StandIn(module, 'factor', lambda: 3)], [3, 6]),
        ([StandIn(module, 'shift', torch.tensor(5.0))], [12, 14]),
        ([StandIn(module, 'weight', torch.tensor([0.0, 4.0]))], [0, 8]),
        (
            [
                StandIn(module, 'factor', lambda: 1),
                StandIn(module, 'weight', torch.zeros(2)),
            ],
            [0, 0],
        ),
    ):
        with standing_in(stand_ins):
            assert module(x).tolist() == expected and module.weight is weight
        assert module(x).tolist() == [2, 4] and module.shift is None
        assert module.weight is weight and weight.data_ptr() == before.data_ptr()
        assert not {'forward', 'factor'} & vars(module).keys()


def test_stand_ins_nest_also_for_one_module():
    module, x = Doubles(), torch.ones(2)
    with standing_in([StandIn(module, 'factor', lambda: 3)]):
        with standing_in([StandIn(module, 'factor', lambda: 4)] * 2):
            assert module(x).tolist() == [4, 8]
        assert module(x).tolist() == [3, 6]
    assert module(x).tolist() == [2, 4]


def test_all_is_restored_after_an_error():
    module, x = Doubles(), torch.ones(2)
    with (
        pytest.raises(ZeroDivisionError),
        standing_in([StandIn(module, 'shift', torch.ones(2))]),
    ):
        raise ZeroDivisionError
    with (
        pytest.raises(TypeError),
        standing_in(
            [StandIn(module, 'factor', lambda: 3), StandIn(module, 'shift', 'text')]
        ),
    ):
        pytest.fail('a buffer may not be text')
    assert module(x).tolist() == [2, 4] and 'factor' not in vars(module)
