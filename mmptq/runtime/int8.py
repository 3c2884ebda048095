"""A weight's integers as int8 matrices, where int8 holds them and where it does not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import QuantOp

SUMS = 16
"""Outputs that are added for a sum of the codes: one and, for speed, those that fill a
vector.
"""

WITH_SUMS = 'int8, weight and sums of the codes'
"""What the report says of a weight beside a column of ones."""


class Int8Weight(NamedTuple):
    """A weight that a product of uint8 codes and int8 takes.

    Attributes:
        weight: int8, (out, parts in), or (out + SUMS, in) with sums of the codes.
        parts: Matrices side by side, whose sum the weight is.
        path: For the report.
        above: See :class:`mmptq.runtime.backend.PreparedProduct`.
    """

    weight: Tensor
    parts: int
    path: str
    above: Tensor | None


def int8_weight(op: QuantOp, integers: Tensor) -> Int8Weight:
    """A layer's integers (out, in) as int8, in the way that costs less.

    A second matrix reads the input once more; a sum of the codes takes a row of outputs
    more.
    """
    parts = int8_parts(integers)
    outputs, inputs = integers.shape
    if len(parts) == 1 or outputs > inputs:
        return Int8Weight(torch.cat(parts, 1), len(parts), int8_path(len(parts)), None)
    weight, above = with_sums(op, integers)
    return Int8Weight(weight, 1, WITH_SUMS, above)


def int8_parts(integers: Tensor) -> list[Tensor]:
    """One int8 tensor, or the fewest whose sum the integers are.

    From -255 to 254 these are two, with 255 three.
    """
    low = integers.clamp(-128, 127)
    rest = integers - low
    more = int8_parts(rest) if bool(rest.any()) else []
    return [low.to(torch.int8), *more]


def int8_path(parts: int) -> str:
    """What the report says of weights in so many parts."""
    return {
        1: 'int8',
        2: 'int8, weight in two parts',
        3: 'int8, weight in three parts',
    }[parts]


def with_sums(op: QuantOp, integers: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights ``code - 128`` and, as :data:`SUMS` more outputs, ones and zeros.

    Returns:
        The weights, (out + SUMS, ...), and what each integer lacks, ``128 - z``,
        (out,).
    """
    params = op.quantizer('weight').params
    assert params is not None
    above = 128 - params['zero_point'].reshape(-1)
    above = above.expand(len(integers)).to(integers.dtype)
    more = integers.new_zeros(SUMS, *integers.shape[1:])
    more[0] = 1
    signed = integers - above.view(-1, *[1] * (integers.ndim - 1))
    return torch.cat([signed, more]).to(torch.int8), above


def with_more(values: Tensor, value: float) -> Tensor:
    """Values of outputs, (out,), with those of :data:`SUMS` more."""
    return torch.cat([values, values.new_full((SUMS,), value)])
