"""What a stage of the calibration is, and what it asks the driver to observe for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import nn

from .capture import Block, Call


@dataclass(frozen=True)
class Needs:
    """What is observed of a block, once, before its first stage.

    The order of operations (that of ``block.ops``' runs, in ``block.order``) and the
    float outputs (``block.targets``) are always there. Sums over tokens depend on the
    quantizers that a stage has set, so a stage takes them itself
    (:meth:`mmptq.calibration.Block.grams`).

    Attributes:
        rows: Rows in the sample of each operation's activations, about; 0 for none.
        channels: Values of each channel of inputs that are rescaled by channels; 0 for
            none.
        extremes: Whether the minima and maxima of all operands are wanted.
    """

    rows: int = 0
    channels: int = 0
    extremes: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What serves both."""
        return Needs(
            rows=max(self.rows, other.rows),
            channels=max(self.channels, other.channels),
            extremes=self.extremes or other.extremes,
        )


class Stage(Protocol):
    """One step of the calibration, such as a search of ranges or a reconstruction."""

    @property
    def needs(self) -> Needs:
        """What the driver observes for it."""
        ...

    def calibrate(self, block: Block) -> bool:
        """Sets or improves what is calibrated in a block that has been observed.

        Returns:
            Whether it helped. If it did not, the block gets back the state before it.
        """
        ...


class PreparingStage(Stage, Protocol):
    """A stage that also changes the whole float network before its first block."""

    def prepare(self, model: nn.Module, spec: Any, calls: Sequence[Call]) -> None:
        """Rewrites the float network; its function stays the same.

        Args:
            model: The converted network, not calibrated.
            spec: How it was converted, if that is known (a ConversionReport).
            calls: Its calls, one an image.
        """
        ...


class WholeMethod:
    """A method that observes its block by itself and returns its float outputs, as a
    stage.

    Methods were like this before there were stages: ``propagate_error`` and
    ``calibrate(block)``.
    """

    needs = Needs()

    def __init__(self, method: Any) -> None:
        self.method = method

    def calibrate(self, block: Block) -> bool:
        """Lets the method calibrate the block, and keeps the outputs that it returns."""
        block.targets = self.method.calibrate(block)
        return True


def as_stages(methods: Any) -> list[Stage]:
    """The stages that a method, a stage or a sequence of them stands for.

    One that has ``stages`` is a short name for several; one without ``needs`` is a
    method that does everything by itself.
    """
    stages: list[Any] = []
    for method in methods if isinstance(methods, list | tuple) else [methods]:
        if hasattr(method, 'stages'):
            stages += method.stages()
        else:
            stages.append(method if hasattr(method, 'needs') else WholeMethod(method))
    return cast(list[Stage], stages)


def propagates(methods: Any) -> bool:
    """Whether a block gets its inputs from the quantized model, as the first method
    says.
    """
    first = methods[0] if isinstance(methods, list | tuple) else methods
    return bool(getattr(first, 'propagate_error', False))


def combined_needs(stages: Iterable[Stage]) -> Needs:
    """What serves all stages."""
    needs = Needs()
    for stage in stages:
        needs |= stage.needs
    return needs
