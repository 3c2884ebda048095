"""A block's forward that is run several times on one call, from one operation on: what
came before it is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..layers import QuantOp
from ..layers.standins import in_place_of_forward, standing_in
from .capture import versions


class Replay:
    """Answers of the parts of a module that had ended when an operation began.

    The first :meth:`run` records them; in later ones these parts are not run but answer
    the same. So the call must be the same, and nothing may change but the operation and
    what follows it. Where the module changes an answer in place, all parts run every
    time.

    Args:
        module: The module, or a function.
        first: The operation.
    """

    def __init__(self, module: Callable[..., Any], first: QuantOp) -> None:
        self.module, self.first = module, first
        self.answers: list[tuple[nn.Module, Any, list[int]]] | None = None
        self.recording = False
        self.waiting: dict[nn.Module, deque[Any]] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module."""
        self.recording = self.answers is None
        self.waiting = {}
        if self.answers is None or any(
            versions(answer) != then for _, answer, then in self.answers
        ):
            self.answers = []
        for part, answer, _ in [] if self.recording else self.answers:
            self.waiting.setdefault(part, deque()).append(answer)
        return self.module(*args, **kwargs)

    def answered(
        self, part: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The output of a part, remembered or its own."""
        if self.waiting.get(part):
            return self.waiting[part].popleft()
        self.recording = self.recording and part is not self.first
        if not self.recording:
            return own(*args, **kwargs)
        assert self.answers is not None
        before = len(self.answers)
        output = own(*args, **kwargs)
        if (
            self.recording
        ):  # the whole part ended before the operation: it answers for its own parts
            self.answers[before:] = [(part, output, versions(output))]
        return output


@contextmanager
def replayed(module: Callable[..., Any], first: QuantOp) -> Iterator[Replay]:
    """A :class:`Replay`; inside, the parts of the module (of a function: none) are
    under its control.
    """
    replay = Replay(module, first)
    named = dict(module.named_modules()) if isinstance(module, nn.Module) else {}
    ops = tuple(
        f'{name}.' if name else ''
        for name, part in named.items()
        if isinstance(part, QuantOp)
    )  # the module itself, perhaps
    parts = [
        part
        for name, part in named.items()
        if part is not module and not name.startswith(ops)
    ]

    def controlled(part: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: replay.answered(part, own, *args, **kwargs)

    with standing_in(
        [in_place_of_forward(part, controlled(part, part.forward)) for part in parts]
    ):
        yield replay
