"""Products of two activations as integer products."""
from __future__ import annotations

import sys

from torch import Tensor

from ..layers import QuantMatMul
from ..quantizers.base import in_chunks
from .base import IntegerOp
from .coders import AdaLog, Coder, DeMax, Uniform, Whole, coder
from .errors import NoIntegerForm
from .kernels import integer_product, softmax_side, with_maxima

EXACT = 2**24
"""Sums of integers below this are exact in float32, in any order."""


class IntegerMatMul(IntegerOp):
    """A product of two activations: integers in float32, which torch multiplies exactly; of many small int8 matrices it has no product.

    Sums below 2^24 are exact in float32. Those of a window are; longer rows are summed in parts, and these as int32.
    """

    def __init__(self, op: QuantMatMul) -> None:
        super().__init__()
        self.left, self.right = coder(op.quantizer('left')), coder(op.quantizer('right'))
        if not isinstance(self.right, Uniform) or isinstance(self.left, Whole):
            raise NoIntegerForm(f'a product of {type(self.left).__name__} and {type(self.right).__name__} operands')
        exact = isinstance(self.left, Uniform | DeMax)
        # Products of AdaLog's table values with integers are exact, and their sums are not.
        self.held = int((EXACT - 1) // max(1.0, self._largest(self.left) * self.right.largest)) if exact else sys.maxsize
        self.path = 'integers, exact in float32' if exact else 'AdaLog table values times integers, in float32'

    @property
    def gain(self) -> Tensor:
        """What one of the sums is worth, but for DeMax's steps."""
        assert isinstance(self.right, Uniform)
        return self.right.scale if isinstance(self.left, DeMax) else self.left.scale * self.right.scale  # type: ignore[union-attr]

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The product, in the dtype of the left operand."""
        assert isinstance(self.right, Uniform)
        values = _integers(self.right, right)
        if isinstance(self.left, DeMax):
            codes, side = softmax_side(left.float(), self.left)
            return (with_maxima(integer_product(codes, values, self.held), values, *side) * self.gain).to(left.dtype)
        assert not isinstance(self.left, DeMax)
        return (integer_product(_integers(self.left, left), values, self.held) * self.gain).to(left.dtype)

    @staticmethod
    def _largest(coder: Coder) -> float:
        assert isinstance(coder, Uniform | DeMax)
        return coder.largest if isinstance(coder, Uniform) else float(coder.most)


def _integers(coder: Uniform | AdaLog | Whole, x: Tensor) -> Tensor:
    """A coder's integers, by pieces of the first dimension that stay in the cache; whole if its parameters lie along that."""
    return in_chunks(lambda piece, out: out.copy_(coder.integers(piece)), x.float(), split=coder.scale.ndim < x.ndim)
