"""Linear layers as integer products."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import QuantLinear
from .base import IntegerOp, has_onednn, input_coder, int8_parts, int8_path, integer_weight, with_more, with_sums
from .coders import AdaLog, Change, Uniform, change
from .kernels import encode, encode_normalized, encode_normalized_and_copy

FEWEST = 32
"""Rows that an int8 product has at least."""


class IntegerLinear(IntegerOp):
    """A linear layer: uint8 codes times int8 weights, int32 sums, one float scale for each output.

    A weight is kept as ``code - zero_point``. int8 does not hold all of these where an 8-bit weight's zero point is not in the middle.
    Then the weight is the sum of two (with 255, three) int8 matrices that read the input as often, or, in a layer with no more outputs
    than inputs, ``code - 128`` beside a column of ones, whose product makes up for the difference. AdaLog's inputs are table values,
    integers below 2^(b + 1) times powers of two; torch has no such product of integers, and they are multiplied in float32, where each
    product of two is exact.

    Args:
        op: A calibrated layer.
        order: Of the inputs, if they will come in another one, (in,).

    Raises:
        NotImplementedError: If it cannot be computed so; the text is the reason.
    """

    answers_for_weight = True
    offset: Tensor | None
    weight: Tensor

    def __init__(self, op: QuantLinear, order: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = op.in_features, op.out_features
        self.coder, self.change = input_coder(op), change(op)
        integers, scale, value = integer_weight(op)
        bias = op.corrected_bias(value)
        if order is not None:
            integers = integers[:, order]
            self.change = None if self.change is None else Change(*(each.expand(len(order))[order] for each in self.change))
        self.register_buffer('offset', None if bias is None else bias.detach().clone())
        self.biased = op.bias is not None
        self.gain = scale * self.coder.scale  # what one of the sums is worth, (out,)
        self.packed: Tensor | None = None
        self.excess: Tensor | None = None
        self.parts = 1
        if isinstance(self.coder, AdaLog):
            self.path = 'AdaLog table values times integer weights, in float32'
            self.register_buffer('weight', integers.float())
            return
        self.zero_point = int(self.coder.zero)
        parts = int8_parts(integers)
        if len(parts) == 1 or self.out_features > self.in_features:
            self.parts, self.path, weight = len(parts), int8_path(len(parts)), torch.cat(parts, 1)
        else:
            self.path = 'int8, weight and sums of the codes'
            weight, above = with_sums(op, integers)
            self.excess = self.gain * above
            self.gain = with_more(self.gain, 1)
            self.offset = None if self.offset is None else with_more(self.offset, 0)
        if has_onednn(weight.device):
            self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
            self.weight_zero = torch.zeros(len(weight), dtype=torch.int64)
            self.register_buffer('weight', weight.new_empty(0, weight.shape[1]))
        elif weight.is_cuda and (weight.shape[0] % 8 or weight.shape[1] % 8):
            raise NotImplementedError('torch._int_mm takes sizes on a GPU that 8 divides')
        else:
            self.path += ', by _int_mm'
            self.register_buffer('weight', weight)
            self.sums = weight.sum(1, dtype=torch.int64)

    @property
    def bias(self) -> Tensor | None:
        """What a reader of the layer's bias finds; ``offset`` has also what the rescale adds, with or without a bias."""
        return self.offset if self.biased else None

    def encode(self, x: Tensor) -> Tensor:
        """Codes of an input (rows, in), or AdaLog's table values."""
        return encode(x.float(), self.change, self.coder)  # type: ignore[no-any-return]

    def encode_normalized(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """:meth:`encode` of a layer norm's output from its input (rows, in)."""
        return encode_normalized(x, norm.weight, norm.bias, norm.eps, self.change, self.coder)  # type: ignore[no-any-return]

    def encode_normalized_and_copy(self, norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`encode_normalized`, and a copy of the input."""
        return encode_normalized_and_copy(x, norm.weight, norm.bias, norm.eps, self.change, self.coder)  # type: ignore[no-any-return]

    def multiply(self, codes: Tensor, gelu: bool = False) -> Tensor:
        """The output from codes (rows, in), float32, (rows, out); with ``gelu`` through GELU."""
        if not len(codes):
            return self.gain.new_zeros(0, self.out_features)
        at_once = gelu and self.gives_codes
        out = self._plain(codes) if self.packed is None else self._product(codes, self.gain, self.offset, gelu=at_once)
        if self.excess is not None:
            out = torch.addcmul(out[:, :self.out_features], out[:, self.out_features, None], self.excess)
        return F.gelu(out) if gelu and not at_once else out

    def add_to(self, x: Tensor, codes: Tensor) -> None:
        """Adds the output from codes (rows, in) to a tensor (rows, out), in place."""
        if self.gives_codes and x.dtype == torch.float32:
            torch.ops.onednn.qlinear_pointwise.binary(self._beside(codes), 1.0, self.zero_point, self.packed, self.gain, self.weight_zero,
                                                      x, self.offset, 1.0, 0, torch.float32, 1.0, 0, 'sum', 1.0, 'none', [], '')
        else:
            x.add_(self.multiply(codes))

    def codes_of_gelu(self, codes: Tensor, coder: Uniform) -> Tensor:
        """Codes of the output through GELU, by a coder of one scale, uint8, (rows, out); only if :attr:`gives_codes`."""
        out = self._product(codes, self.gain, self.offset, (float(coder.scale), int(coder.zero), torch.uint8), True)
        return out if coder.most == 255 else out.clamp_(max=coder.most)

    def scale_outputs(self, factor: Tensor) -> None:
        """Multiplies what it computes by a factor for each output, (out,), from now on."""
        more = factor if self.excess is None else with_more(factor, 1)
        self.gain = self.gain * more
        self.offset = None if self.offset is None else self.offset * more
        self.excess = None if self.excess is None else self.excess * factor

    def in_steps(self, factor: Tensor, zero: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from codes (rows, in) to ``clip(round(factor output + zero), 0, 255)``, uint8, (rows, out).

        Args:
            factor: Steps that one is worth, (out,).
            zero: Zero points, (out,).
        """
        if self.gives_codes:
            offset = zero if self.offset is None else torch.addcmul(zero, self.offset, factor)
            return partial(self._product, gain=self.gain * factor, offset=offset, after=(1.0, 0, torch.uint8))
        return lambda codes: torch.addcmul(zero, self.multiply(codes), factor).round_().clamp_(0, 255).to(torch.uint8)

    def _product(self, codes: Tensor, gain: Tensor, offset: Tensor | None, after: tuple[float, int, torch.dtype] = (1.0, 0, torch.float32),
                 gelu: bool = False) -> Tensor:
        """oneDNN's ``sums gain + offset``, through GELU or not, then in steps of a scale about a zero point."""
        return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
            self._beside(codes), 1.0, self.zero_point, self.packed, gain, self.weight_zero, offset, *after, 'gelu' if gelu else 'none', [],
            'none')

    def _beside(self, codes: Tensor) -> Tensor:
        """The codes for each part of the weight."""
        return codes if self.parts == 1 else torch.cat([codes] * self.parts, 1)

    def _plain(self, codes: Tensor) -> Tensor:
        """The output without oneDNN."""
        if isinstance(self.coder, AdaLog):
            out = F.linear(codes, self.weight).mul_(self.gain)
        else:
            out = int_mm(self._beside(codes), self.weight, self.zero_point, self.sums) * self.gain
        return out if self.offset is None else out.add_(self.offset)

    @property
    def gives_codes(self) -> bool:
        """Whether the product itself can give codes, or go through GELU."""
        return self.packed is not None and self.excess is None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of the input."""
        with torch._C.DisableTorchFunction():  # an attention's mode looks for layers and products of its own
            out = self.multiply(self.encode(x.reshape(-1, self.in_features)))
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and path."""
        return f'{self.in_features}, {self.out_features}, {self.path}'


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
    product = torch._int_mm(signed, weight.t()) if codes.shape[1] > 1 else signed.to(torch.int32) * weight.t().to(torch.int32)
    return product[:rows] + ((128 - zero_point) * sums).to(torch.int32)
