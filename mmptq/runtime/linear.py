"""Linear layers as integer products."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import QuantLinear
from .backend import Backend, PreparedProduct
from .base import IntegerOp, input_coder, integer_weight
from .coders import AdaLog, Change, Uniform, change
from .int8 import with_more
from .kernels import encode, encode_normalized, encode_normalized_and_copy
from .products import Steps, Tables


class IntegerLinear(IntegerOp):
    """A linear layer: uint8 codes times int8 weights, int32 sums, one float scale for
    each output.

    A weight is kept as ``code - zero_point``. int8 does not hold all of these where an
    8-bit weight's zero point is not in the middle. Then the weight is the sum of two
    (with 255, three) int8 matrices that read the input as often, or, in a layer with no
    more outputs than inputs, ``code - 128`` beside a column of ones, whose product
    makes up for the difference. AdaLog's inputs are table values, integers below 2^(b +
    1) times powers of two; torch has no such product of integers, and they are
    multiplied in float32, where each product of two is exact.

    Args:
        op: A calibrated layer.
        backend: What multiplies its codes.
        order: Of the inputs, if they will come in another one, (in,).

    Raises:
        NoIntegerForm: If it cannot be computed so; the text is the reason.
    """

    answers_for_weight = True
    offset: Tensor | None
    weight: Tensor

    def __init__(
        self, op: QuantLinear, backend: Backend, order: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = op.in_features, op.out_features
        self.coder, self.change = input_coder(op), change(op)
        integers, scale, value = integer_weight(op)
        bias = op.corrected_bias(value)
        if order is not None:
            integers = integers[:, order]
            self.change = (
                None
                if self.change is None
                else Change(*(each.expand(len(order))[order] for each in self.change))
            )
        self.register_buffer('offset', None if bias is None else bias.detach().clone())
        self.register_buffer(
            'weight', integers.new_empty(0, self.in_features, dtype=torch.int8)
        )
        self.biased = op.bias is not None
        self.gain = scale * self.coder.scale  # what one of the sums is worth, (out,)
        self.excess: Tensor | None = None
        self.product, self.path, above = prepared(backend, op, integers, self.coder)
        if above is not None:
            self.excess = self.gain * above
            self.gain = with_more(self.gain, 1)
            self.offset = None if self.offset is None else with_more(self.offset, 0)

    @property
    def bias(self) -> Tensor | None:
        """What a reader of the layer's bias finds.

        ``offset`` has also what the rescale adds, with or without a bias.
        """
        return self.offset if self.biased else None

    def encode(self, x: Tensor) -> Tensor:
        """Codes of an input (rows, in), or AdaLog's table values."""
        return encode(x.float(), self.change, self.coder)  # type: ignore[no-any-return]

    def encode_normalized(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """:meth:`encode` of a layer norm's output from its input (rows, in)."""
        return encode_normalized(
            x, norm.weight, norm.bias, norm.eps, self.change, self.coder
        )  # type: ignore[no-any-return]

    def encode_normalized_and_copy(
        self, norm: nn.LayerNorm, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`encode_normalized`, and a copy of the input."""
        return encode_normalized_and_copy(
            x, norm.weight, norm.bias, norm.eps, self.change, self.coder
        )  # type: ignore[no-any-return]

    def multiply(self, codes: Tensor, gelu: bool = False) -> Tensor:
        """The output from codes (rows, in), float32, (rows, out); with ``gelu`` through
        GELU.
        """
        if not len(codes):
            return self.gain.new_zeros(0, self.out_features)
        at_once = gelu and self.at_once
        out = self.product(codes, self.gain, self.offset, gelu=at_once)
        if self.excess is not None:
            out = torch.addcmul(
                out[:, : self.out_features],
                out[:, self.out_features, None],
                self.excess,
            )
        return F.gelu(out) if gelu and not at_once else out

    def add_to(self, x: Tensor, codes: Tensor) -> None:
        """Adds the output from codes (rows, in) to a tensor (rows, out), in place."""
        if self.at_once and x.dtype == torch.float32:
            self.product.add_to(x, codes, self.gain, self.offset)
        else:
            x.add_(self.multiply(codes))

    def scaled(self, factor: Tensor) -> IntegerLinear:
        """The layer with what it computes multiplied by a factor for each output,
        (out,).

        It shares the weight.
        """
        layer = copy(self)
        layer._buffers = dict(self._buffers)
        more = factor if self.excess is None else with_more(factor, 1)
        layer.gain = self.gain * more
        layer.offset = None if self.offset is None else self.offset * more
        layer.excess = None if self.excess is None else self.excess * factor
        return layer

    def in_steps(self, factor: Tensor, zero: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from codes (rows, in) to ``clip(round(factor output + zero), 0,
        255)``, uint8, (rows, out).

        Args:
            factor: Steps that one is worth, (out,).
            zero: Zero points, (out,).
        """
        if self.at_once:
            offset = (
                zero
                if self.offset is None
                else torch.addcmul(zero, self.offset, factor)
            )
            return partial(
                self.product,
                gain=self.gain * factor,
                offset=offset,
                steps=Steps(1.0, 0, 255),
            )
        return lambda codes: (
            torch.addcmul(zero, self.multiply(codes), factor)
            .round_()
            .clamp_(0, 255)
            .to(torch.uint8)
        )

    def gelu_in_steps(
        self, coder: Uniform | AdaLog, change: Change | None
    ) -> Callable[[Tensor], Tensor] | None:
        """A function from codes (rows, in) to those of the output through GELU, uint8,
        (rows, out), made without floats between them.

        Args:
            coder: Of the layer that reads it, with one scale.
            change: Before that.

        Returns:
            None if the product has no such function.
        """
        if (
            not self.at_once
            or not isinstance(coder, Uniform)
            or (change is not None and not self.product.takes_change)
        ):
            return None
        if change is not None:
            change = Change(
                *(each.expand(self.out_features).contiguous() for each in change)
            )
        steps = Steps(float(coder.scale), int(coder.zero), coder.most, change)
        return partial(
            self.product, gain=self.gain, offset=self.offset, steps=steps, gelu=True
        )

    @property
    def at_once(self) -> bool:
        """Whether the product itself can give codes, or go through GELU."""
        return self.product.at_once and self.excess is None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of the input."""
        with (
            torch._C.DisableTorchFunction()
        ):  # an attention's mode looks for layers and products of its own
            out = self.multiply(self.encode(x.reshape(-1, self.in_features)))
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and path."""
        return f'{self.in_features}, {self.out_features}, {self.path}'


def prepared(
    backend: Backend, op: QuantLinear, integers: Tensor, coder: Uniform | AdaLog
) -> PreparedProduct:
    """What multiplies the inputs of a coder with a weight's integers (out, in)."""
    if isinstance(coder, Uniform):
        return backend.product(op, integers, coder)
    path = (  # the same on every device
        'AdaLog table values times integer weights, in float32'
    )
    return PreparedProduct(Tables(integers), path)
