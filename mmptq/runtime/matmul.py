"""Products of two activations as integer products."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..layers import QuantMatMul
from ..quantizers import AdaLogQuantizer, DeMaxQuantizer, Quantizer, UniformQuantizer
from ..quantizers.base import in_chunks
from ..quantizers.dispatch import entry_for_pair
from .base import IntegerOp
from .coders import AdaLog, Coder, DeMax, Uniform, coder
from .errors import NoIntegerForm
from .kernels import integer_product, softmax_side, with_maxima

EXACT = 2**24
"""Sums of integers below this are exact in float32, in any order."""


class Pair(NamedTuple):
    """How operands of two kinds are multiplied.

    Attributes:
        path: For the report.
        held: From both coders how many columns there may be for float32 to hold the
            sums.
        gain: From both coders what one of the sums is worth, () or (heads, 1, 1).
        sums: The sums, float, (..., rows, columns), from the left operand (..., rows,
            inner), the integers of the right one (..., inner, columns), the left coder
            and ``held``.
    """

    path: str
    held: Callable[[Any, Uniform], int]
    gain: Callable[[Any, Uniform], Tensor]
    sums: Callable[[Tensor, Tensor, Any, int], Tensor]


class IntegerMatMul(IntegerOp):
    """A product of two activations: integers in float32, which torch multiplies
    exactly.

    Of many small int8 matrices torch has no product. Sums below 2^24 are exact in
    float32. Those of a window are; longer rows are summed in parts, and these as int32.

    Raises:
        NoIntegerForm: If there is no entry in :data:`PAIRS` for the quantizers of both
            operands.
    """

    right: Uniform

    def __init__(self, op: QuantMatMul) -> None:
        super().__init__()
        quantizers = op.quantizer('left'), op.quantizer('right')
        pair = pair_for(*quantizers)
        left, right = (coder(quantizer) for quantizer in quantizers)
        assert isinstance(right, Uniform)
        self.left: Coder = left
        self.right = right
        self.path = pair.path
        self.held = pair.held(left, right)
        self.gain = pair.gain(left, right)
        self.sums = pair.sums

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The product, in the dtype of the left operand."""
        values = _integers(self.right, right)
        sums = self.sums(left.float(), values, self.left, self.held)
        return (sums * self.gain).to(left.dtype)


def pair_for(left: Quantizer, right: Quantizer) -> Pair:
    """How operands of two quantizers are multiplied, by their classes or those they
    inherit from.

    Raises:
        NoIntegerForm: If :data:`PAIRS` has no entry for them.
    """
    pair = entry_for_pair(PAIRS, left, right)
    if pair is None:
        operands = (
            f'a product of {type(left).__name__} and {type(right).__name__} operands'
        )
        raise NoIntegerForm(f'{operands} has no entry in mmptq.runtime.matmul.PAIRS')
    return pair


def columns_held(left: float, right: Uniform) -> int:
    """Columns whose sums float32 holds, of a largest magnitude times what a coder
    multiplies.
    """
    return int((EXACT - 1) // max(1.0, left * right.largest))


def product_of_integers(
    left: Tensor, values: Tensor, coder: Uniform | AdaLog, held: int
) -> Tensor:
    """The sums where the left operand has integers, or AdaLog's table values."""
    return integer_product(_integers(coder, left), values, held)


def product_with_maxima(
    left: Tensor, values: Tensor, coder: DeMax, held: int
) -> Tensor:
    """The sums in DeMax's steps, and what its maxima gather."""
    codes, side = softmax_side(left, coder)
    product: Tensor = with_maxima(integer_product(codes, values, held), values, *side)
    return product


def both_scales(left: Uniform | AdaLog, right: Uniform) -> Tensor:
    """What a product of one and one is worth."""
    return left.scale * right.scale


UNIFORM_PAIR = Pair(
    path='integers, exact in float32',
    held=lambda left, right: columns_held(left.largest, right),
    gain=both_scales,
    sums=product_of_integers,
)
ADALOG_PAIR = Pair(
    path='AdaLog table values times integers, in float32',
    held=lambda left, right: (
        sys.maxsize
    ),  # each product is exact; their sum is not, however it is split
    gain=both_scales,
    sums=product_of_integers,
)
DEMAX_PAIR = Pair(
    path='integers, exact in float32',
    held=lambda left, right: columns_held(float(left.most), right),
    gain=lambda left, right: right.scale,
    sums=product_with_maxima,
)

PAIRS: dict[tuple[type, type], Pair] = {
    (UniformQuantizer, UniformQuantizer): UNIFORM_PAIR,
    (AdaLogQuantizer, UniformQuantizer): ADALOG_PAIR,
    (DeMaxQuantizer, UniformQuantizer): DEMAX_PAIR,
}
"""How two operands are multiplied, by the classes of their quantizers."""


def _integers(coder: Uniform | AdaLog, x: Tensor) -> Tensor:
    """A coder's integers, by pieces of the first dimension that stay in the cache.

    In one piece if its parameters lie along that dimension.
    """

    def write(piece: Tensor, out: Tensor) -> Tensor:
        return out.copy_(coder.integers(piece))

    return in_chunks(write, x.float(), split=coder.scale.ndim < x.ndim)
