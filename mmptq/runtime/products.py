"""Products of codes with a weight's integers: what each gives, and torch's own, for any
device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .coders import Change
from .errors import NoIntegerForm

FEWEST = 32
"""Rows that ``torch._int_mm`` gets at least."""


class Steps(NamedTuple):
    """What a product is to give in place of floats, uint8, of the changed output:
    ``clip(round(output / scale) + zero, 0, most)``.
    """

    scale: float
    zero: int
    most: int
    change: Change | None = None


class Product(Protocol):
    """``(codes - z) weight^T``, times a gain and with an offset for each output.

    Attributes:
        at_once: Whether it takes ``steps`` and ``gelu``, and adds to a tensor without
            another one.
        takes_change: Whether the steps may be of a changed output.
    """

    at_once: bool
    takes_change: bool

    def __call__(
        self,
        codes: Tensor,
        gain: Tensor,
        offset: Tensor | None,
        steps: Steps | None = None,
        gelu: bool = False,
    ) -> Tensor:
        """From codes (rows, in) floats, float32, or their steps, uint8, (rows, out).

        With ``gelu`` what it gives has gone through GELU.
        """

    def add_to(
        self, x: Tensor, codes: Tensor, gain: Tensor, offset: Tensor | None
    ) -> None:
        """Adds it to a contiguous float32 tensor (rows, out), in place."""


class Plain:
    """Products that give floats only."""

    at_once = takes_change = False

    def __call__(
        self,
        codes: Tensor,
        gain: Tensor,
        offset: Tensor | None,
        steps: Steps | None = None,
        gelu: bool = False,
    ) -> Tensor:
        assert steps is None and not gelu
        sums = self.sums(codes)
        out = sums.mul_(gain) if sums.is_floating_point() else sums * gain
        return out if offset is None else out.add_(offset)

    def add_to(
        self, x: Tensor, codes: Tensor, gain: Tensor, offset: Tensor | None
    ) -> None:
        x.add_(self(codes, gain, offset))

    def sums(self, codes: Tensor) -> Tensor:
        """``(codes - z) weight^T``, int32 or float32."""
        raise NotImplementedError


class IntMM(Plain):
    """That of :func:`torch._int_mm`.

    Args:
        weight: int8, (out, in), or several of these side by side, whose sum it is.
        parts: How many.
        zero_point: Of the codes.

    Raises:
        NoIntegerForm: On a GPU for sizes that torch does not take there.
    """

    def __init__(self, weight: Tensor, parts: int, zero_point: int) -> None:
        if weight.is_cuda and (weight.shape[0] % 8 or weight.shape[1] % 8):
            raise NoIntegerForm('torch._int_mm takes sizes on a GPU that 8 divides')
        self.weight, self.parts, self.zero_point = weight, parts, zero_point
        self.lacking = weight.sum(1, dtype=torch.int64)

    def sums(self, codes: Tensor) -> Tensor:
        return int_mm(
            beside(codes, self.parts), self.weight, self.zero_point, self.lacking
        )


class Tables(Plain):
    """Of AdaLog's table values with integers, in float32."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.float()

    def sums(self, codes: Tensor) -> Tensor:
        return F.linear(codes, self.weight)


def beside(codes: Tensor, parts: int) -> Tensor:
    """Codes (rows, in) for each part of a weight, (rows, parts in)."""
    return codes if parts == 1 else torch.cat([codes] * parts, 1)


def int_mm(codes: Tensor, weight: Tensor, zero_point: int, sums: Tensor) -> Tensor:
    """``(codes - zero_point) weight^T`` by :func:`torch._int_mm`, int32.

    Args:
        codes: uint8, (rows, in).
        weight: int8, (out, in).
        zero_point: Of the codes.
        sums: Of the rows of the weight, int64, (out,).
    """
    rows = len(codes)
    if rows < FEWEST:  # a GPU takes no fewer
        codes = F.pad(codes, (0, 0, 0, FEWEST - rows))
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    # torch._int_mm misreads the transpose of a single column.
    product = (
        torch._int_mm(signed, weight.t())
        if codes.shape[1] > 1
        else signed.to(torch.int32) * weight.t().to(torch.int32)
    )
    return product[:rows] + ((128 - zero_point) * sums).to(torch.int32)
