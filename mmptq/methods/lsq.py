"""LSQ (Esser et al., ICLR 2020): the scale of an activation's quantizer is learned;
backwards, rounding is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..layers.standins import StandIn, in_place_of_forward
from ..quantizers import AdaLogQuantizer, Float, Quantizer, UniformQuantizer

LEAST = 0.01
"""The least that a learned scale may be, as a part of what the search found."""


class StraightThrough(torch.autograd.Function):
    """A quantizer whose rounding, backwards, is taken for none: ``x`` within the
    quantizer's range passes, beyond it is cut.

    The gradient by the scale follows from ``y = s Q(x / s)``: it is ``(y - x) / s``
    within the range, ``y / s`` beyond it (LSQ, equation 3).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, quantizer: Quantizer
    ) -> Tensor:  # type: ignore[override]
        """What the quantizer does; ``scale`` is its scale."""
        y = type(quantizer).forward(quantizer, x)
        low, high = ends(quantizer, scale)
        ctx.save_for_backward(x, y, low, high, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        """The gradients by ``x`` and ``scale``."""
        x, y, low, high, scale = ctx.saved_tensors
        inside = (x >= low) & (x <= high)
        by_scale = None
        if ctx.needs_input_grad[1]:
            by_scale = (grad * (y - torch.where(inside, x, 0)) / scale).sum_to_size(
                scale.shape
            )
        return grad * inside, by_scale, None


def ends(quantizer: Quantizer, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Between what values a quantizer rounds; beyond, it cuts. Where nothing is known
    it rounds everywhere.
    """
    if isinstance(quantizer, UniformQuantizer):
        assert quantizer.zero_point is not None
        return scale * (-0.5 - quantizer.zero_point), scale * (
            quantizer.levels - 0.5 - quantizer.zero_point
        )
    if isinstance(quantizer, AdaLogQuantizer):
        return torch.zeros_like(scale), scale.detach()
    return torch.full_like(scale, -math.inf), torch.full_like(scale, math.inf)


class Activation:
    """The quantizer of an activation, whose scale is learned unless it is fixed or
    there is none.

    Attributes:
        scale: Its scale. That of the quantizer shares its memory, and so is always the
            present one.
        learned: Whether it is learned.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        found = (quantizer.params or {}).get('scale')
        self.learned = (
            found is not None and getattr(quantizer, 'fixed_scale', None) is None
        )
        self.scale = (
            quantizer.place.new_ones(()) if found is None else found.detach().clone()
        )
        self.least = LEAST * self.scale
        if self.learned:
            quantizer.scale = self.scale.detach()
            self.scale.requires_grad_()

    def stand_ins(self) -> Iterator[StandIn]:
        """What lets the operation quantize with a gradient."""
        if not isinstance(self.quantizer, Float):
            yield in_place_of_forward(self.quantizer, self.quantized)

    def quantized(
        self, x: Tensor, before: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """In place of the quantizer's forward."""
        return StraightThrough.apply(
            before(x) if before else x, self.scale, self.quantizer
        )  # type: ignore[no-any-return,no-untyped-call]
