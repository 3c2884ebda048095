"""What stands in for a part of a module for a while: the one way in which a forward is
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class StandIn(NamedTuple):
    """What takes the place of one attribute of a module.

    Attributes:
        module: The module.
        name: The attribute: a method, a buffer or a parameter.
        value: What is there meanwhile: a function that is called without ``self``, a
            tensor, or for a parameter its data, in a tensor of the same shape.
    """

    module: nn.Module
    name: str
    value: Any


def in_place_of_forward(module: nn.Module, forward: Callable[..., Any]) -> StandIn:
    """The stand-in for what a module computes."""
    return StandIn(module, 'forward', forward)


@contextmanager
def standing_in(stand_ins: Iterable[StandIn]) -> Iterator[None]:
    """Inside, the stand-ins are in place; afterwards all is as before, also after an
    error.
    """
    with ExitStack() as restored:
        for stand_in in stand_ins:
            restored.callback(_put(*stand_in))
        yield


def _put(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Puts a value in place and returns what undoes that."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return _put_data(parameter, value)
    if name not in module._buffers and name not in vars(module):  # the class has it
        setattr(module, name, value)
        return lambda: delattr(module, name)
    own = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, own)


def _put_data(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    own = parameter.data
    parameter.data = value

    def restore() -> None:
        parameter.data = own

    return restore
