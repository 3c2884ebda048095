"""Quantized operations as integer products."""
from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import QuantizationError
from ..layers import QuantConv2d, QuantLinear, QuantMatMul, QuantOp
from ..quantizers import UniformQuantizer
from ..quantizers.base import in_chunks
from .coders import AdaLog, Change, Coder, DeMax, Uniform, Whole, change, coder
from .kernels import encode, encode_normalized, integer_product, softmax_side, with_maxima

EXACT = 2**24
"""Sums of integers below this are exact in float32, in any order."""

SUMS = 16
"""Outputs that are added for a sum of the codes: one and, for speed, those that make it a whole vector."""

FEWEST = 32
"""Rows that an int8 product has at least."""


class IntegerOp(nn.Module):
    """An operation whose product is one of integers.

    Attributes:
        path: How it is computed, for the report.
    """

    path: str


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

    def multiply(self, codes: Tensor, gelu: bool = False) -> Tensor:
        """The output from codes (rows, in), float32, (rows, out); with ``gelu`` through GELU."""
        if not len(codes):
            return self.gain.new_zeros(0, self.out_features)
        at_once = gelu and self.gives_codes
        out = self._plain(codes) if self.packed is None else self._product(codes, self.gain, self.offset, gelu=at_once)
        if self.excess is not None:
            out = torch.addcmul(out[:, :self.out_features], out[:, self.out_features, None], self.excess)
        return F.gelu(out) if gelu and not at_once else out

    def add_to(self, out: Tensor, codes: Tensor) -> None:
        """Adds the output from codes (rows, in) to a tensor (rows, out), in place."""
        if self.gives_codes and out.dtype == torch.float32:
            torch.ops.onednn.qlinear_pointwise.binary(self._beside(codes), 1.0, self.zero_point, self.packed, self.gain, self.weight_zero,
                                                      out, self.offset, 1.0, 0, torch.float32, 1.0, 0, 'sum', 1.0, 'none', [], '')
        else:
            out.add_(self.multiply(codes))

    def codes_of_gelu(self, codes: Tensor, coder: Uniform) -> Tensor:
        """Codes of the output through GELU, by a coder of one scale, uint8, (rows, out); only if :attr:`gives_codes`."""
        out = self._product(codes, self.gain, self.offset, (float(coder.scale), int(coder.zero), torch.uint8), True)
        return out if coder.most == 255 else out.clamp_(max=coder.most)

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


class IntegerConv2d(IntegerOp):
    """A convolution: uint8 codes times int8 weights, int32 sums; weights as in :class:`IntegerLinear`."""

    bias: Tensor | None

    def __init__(self, op: QuantConv2d) -> None:
        super().__init__()
        self.coder = input_coder(op)
        integers, scale, _ = integer_weight(op)
        parts = int8_parts(integers)
        if not isinstance(self.coder, Uniform):
            raise NotImplementedError('AdaLog before a convolution')
        if not has_onednn(op.weight.device):
            raise NotImplementedError('integer convolutions need oneDNN and a CPU with VNNI')
        if len(parts) > 1 and op.groups > 1:
            raise NotImplementedError('a convolution in groups with a weight that int8 does not hold')
        self.stride, self.dilation, self.groups = list(op.stride), list(op.dilation), op.groups
        self.out_channels = op.out_channels
        self.padding, self.padding_mode = list(op._reversed_padding_repeated_twice), op.padding_mode
        self.zero_point = int(self.coder.zero)
        self.gain = scale * self.coder.scale
        self.register_buffer('bias', None if op.bias is None else op.bias.detach().clone())
        self.excess: Tensor | None = None
        if len(parts) == 1:
            self.path, weight = 'int8', parts[0]
        else:
            self.path = 'int8, weight and sums of the codes'
            weight, above = with_sums(op, integers)
            self.excess = (self.gain * above)[:, None, None]
            self.gain = with_more(self.gain, 1)
            self.bias = None if self.bias is None else with_more(self.bias, 0)
        self.packed = torch.ops.onednn.qconv_prepack(weight, torch.ones_like(self.gain), 1.0, self.zero_point, self.stride, [0, 0],
                                                     self.dilation, self.groups, None)
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), in the dtype of the input."""
        if not len(x):
            raise QuantizationError('a convolution got a batch of 0 images')
        codes = self._padded(self.encode(x.float())).contiguous(memory_format=torch.channels_last)
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            codes, 1.0, self.zero_point, self.packed, self.gain, self.weight_zero, self.bias, self.stride, [0, 0], self.dilation,
            self.groups, 1.0, 0, torch.float32, 'none', [], '')
        if self.excess is not None:
            out = torch.addcmul(out[:, :self.out_channels], out[:, self.out_channels, None], self.excess)
        return out.to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of an input, in its layout."""
        if x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)
            return encode(x.reshape(-1), None, self.coder).view(x.shape).permute(0, 3, 1, 2)
        return encode(x.reshape(-1), None, self.coder).view(x.shape)

    def _padded(self, codes: Tensor) -> Tensor:
        if not any(self.padding):
            return codes
        if self.padding_mode == 'zeros':
            return F.pad(codes, self.padding, value=self.zero_point)
        return F.pad(codes.float(), self.padding, mode=self.padding_mode).to(torch.uint8)


class IntegerMatMul(IntegerOp):
    """A product of two activations: integers in float32, which torch multiplies exactly; of many small int8 matrices it has no product.

    Sums below 2^24 are exact in float32. Those of a window are; longer rows are summed in parts, and these as int32.
    """

    def __init__(self, op: QuantMatMul) -> None:
        super().__init__()
        self.left, self.right = coder(op.quantizer('left')), coder(op.quantizer('right'))
        if not isinstance(self.right, Uniform) or isinstance(self.left, Whole):
            raise NotImplementedError(f'a product of {type(self.left).__name__} and {type(self.right).__name__} operands')
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


def input_coder(op: QuantOp) -> Uniform | AdaLog:
    """The coder of a layer's input.

    Raises:
        NotImplementedError: If it is float, or has a scale for each channel.
    """
    found = coder(op.quantizer('input'))
    if not isinstance(found, Uniform | AdaLog):
        raise NotImplementedError('its input is float')
    if found.scale.numel() > 1:
        raise NotImplementedError('its input has a scale for each channel')
    return found


def integer_weight(op: QuantOp) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's integers ``code - z``, int16, the scale of each output, (out,), and the weight that they stand for.

    Raises:
        NotImplementedError: If the weight is not quantized uniformly.
    """
    quantizer, weight = op.quantizer('weight'), op.get_parameter('weight').detach()
    if not isinstance(quantizer, UniformQuantizer) or quantizer.params is None:
        raise NotImplementedError('its weight is float')
    rescale = getattr(op, 'rescale', None)
    params = quantizer.params
    codes = quantizer.encode(weight if rescale is None else rescale.weight(weight), **params)
    integers = codes - params['zero_point'].to(codes.dtype)
    return integers, params['scale'].reshape(-1).expand(len(weight)).contiguous(), integers.to(weight.dtype) * params['scale']


def int8_parts(integers: Tensor) -> list[Tensor]:
    """One int8 tensor, or the fewest whose sum the integers are: from -255 to 254 two, with 255 three."""
    low = integers.clamp(-128, 127)
    rest = integers - low
    return [low.to(torch.int8), *(int8_parts(rest) if bool(rest.any()) else [])]


def with_sums(op: QuantOp, integers: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights ``code - 128`` and, as :data:`SUMS` more outputs, ones and zeros; and what each integer lacks, ``128 - z``, (out,)."""
    params = op.quantizer('weight').params
    assert params is not None
    above = (128 - params['zero_point'].reshape(-1)).expand(len(integers)).to(integers.dtype)
    more = integers.new_zeros(SUMS, *integers.shape[1:])
    more[0] = 1
    return torch.cat([integers - above.view(-1, *[1] * (integers.ndim - 1)), more]).to(torch.int8), above


def with_more(values: Tensor, value: float) -> Tensor:
    """Values of outputs, (out,), with those of :data:`SUMS` more."""
    return torch.cat([values, values.new_full((SUMS,), value)])


def int8_path(parts: int) -> str:
    """What the report says of weights in so many parts."""
    return 'int8' + ('' if parts == 1 else f', weight in {["two", "three"][parts - 2]} parts')


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


def has_onednn(device: torch.device) -> bool:
    """Whether integer products of oneDNN are there and exact (without VNNI their 16-bit sums saturate)."""
    return device.type == 'cpu' and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
