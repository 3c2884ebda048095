"""What a quantizer does at run time: from a real tensor to the integers that a product
multiplies.

Each coder is a tuple of tensors and plain numbers, so that ``torch.compile`` sees
through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import GeluShift, QuantOp, Rescale
from ..quantizers import (
    AdaLogQuantizer,
    DeMaxQuantizer,
    Float,
    Quantizer,
    UniformQuantizer,
)
from ..quantizers.adalog import R, decode_table
from .errors import required


class Uniform(NamedTuple):
    """Codes ``clip(round(x / s) + z, 0, most)``; integers ``code - z``, worth ``scale``
    each.

    Attributes:
        inverse: 1 / s.
        zero: z, float.
        most: N - 1.
        scale: s.
    """

    inverse: Tensor
    zero: Tensor
    most: int
    scale: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """Codes, float."""
        return (torch.round(x * self.inverse) + self.zero).clamp(0, self.most)

    def integers(self, x: Tensor) -> Tensor:
        """What is multiplied, float."""
        return self.codes(x) - self.zero

    @property
    def largest(self) -> float:
        """The largest magnitude that is multiplied."""
        return float(torch.maximum(self.zero, self.most - self.zero).max())


class AdaLog(NamedTuple):
    """Codes ``round(-log2(clip(x / s, 0, 1)) r / q)``.

    A code stands for an integer below 2^(b + 1) times a power of two, worth ``scale``.

    Attributes:
        full: s, at which the logarithm is zero.
        rate: -r / q.
        last: The code of zero, the last one.
        table: The value of each code, NaN's behind them, (last + 2,).
        scale: s / G.
    """

    full: Tensor
    rate: Tensor
    last: int
    table: Tensor
    scale: Tensor

    def integers(self, x: Tensor) -> Tensor:
        """What is multiplied: table values, float."""
        steps = (x / self.full).clamp(0, 1).log2() * self.rate
        codes = steps.round().clamp(max=self.last)
        return self.table[codes.nan_to_num(nan=self.last + 1).to(torch.int32)]


class DeMax(NamedTuple):
    """Codes of each row without its largest entries, and these apart
    (:class:`mmptq.quantizers.DeMaxQuantizer`).

    Attributes:
        most: N - 1.
        maxima: Entries taken out of a row.
        half: Whether side data are rounded to float16.
    """

    most: int
    maxima: int
    half: bool


class Whole(NamedTuple):
    """Leaves a float operand as it is."""

    scale: Tensor

    def integers(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x


Coder = Uniform | AdaLog | DeMax | Whole


class Change(NamedTuple):
    """``x factor - shift``, what stands between an activation and its coder
    (:mod:`mmptq.layers.rescale`).
    """

    factor: Tensor
    shift: Tensor


def coder(quantizer: Quantizer) -> Coder:
    """The coder of a calibrated quantizer, by :data:`CODERS`.

    Raises:
        NoIntegerForm: If the table has no entry for its class, nor for one that it
            inherits from.
    """
    make = required(CODERS, quantizer, 'mmptq.runtime.coders.CODERS')
    return make(quantizer)


def uniform_coder(quantizer: UniformQuantizer) -> Uniform:
    """That of a uniform quantizer."""
    scale, zero_point = quantizer.scale, quantizer.zero_point
    assert scale is not None and zero_point is not None
    return Uniform(
        scale.reciprocal(), zero_point.to(scale.dtype), quantizer.levels - 1, scale
    )


def adalog_coder(quantizer: AdaLogQuantizer) -> AdaLog:
    """That of an AdaLog quantizer: its tables of shifts and mantissas become one of
    values.
    """
    scale, q = quantizer.scale, quantizer.q
    assert scale is not None and q is not None
    shift, mantissa, largest = decode_table(q, quantizer.levels)
    values = torch.exp2(-shift) * mantissa
    # A strict quantizer takes the last of its codes for zero; else zero is one more.
    values = torch.cat([values, shift.new_zeros(1)])[: quantizer.zero_code]
    table = torch.cat([values, shift.new_tensor([0.0, torch.nan])])
    return AdaLog(scale, -R / q, quantizer.zero_code, table.float(), scale / largest)


def demax_coder(quantizer: DeMaxQuantizer) -> DeMax:
    """That of a DeMax quantizer, which finds its step in each row."""
    return DeMax(quantizer.levels - 1, quantizer.maxima, quantizer.side == 'float16')


def whole_coder(quantizer: Float) -> Whole:
    """That of an operand that a recipe leaves in float."""
    return Whole(quantizer.place.new_ones(()))


CODERS: dict[type[Quantizer], Callable[[Any], Coder]] = {
    UniformQuantizer: uniform_coder,
    AdaLogQuantizer: adalog_coder,
    DeMaxQuantizer: demax_coder,
    Float: whole_coder,
}
"""What makes the coder of a quantizer, by its class; a subclass has that of its base.
"""


def change(op: QuantOp) -> Change | None:
    """What an operation does to its input before that is quantized."""
    rescale = getattr(op, 'rescale', None)
    if (
        isinstance(rescale, Rescale)
        and rescale.scale is not None
        and rescale.shift is not None
    ):
        return Change(rescale.scale.reciprocal(), rescale.shift)
    if isinstance(rescale, GeluShift) and rescale.shift is not None:
        return Change(torch.ones_like(rescale.shift), -rescale.shift)
    return None
