"""Convolutions as integer products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizationError
from ..layers import QuantConv2d
from .backend import Backend
from .base import IntegerOp, input_coder, integer_weight
from .coders import Uniform
from .errors import NoIntegerForm
from .int8 import with_more
from .kernels import encode


class IntegerConv2d(IntegerOp):
    """A convolution: uint8 codes times int8 weights, int32 sums.

    Its weight is held as that of :class:`mmptq.runtime.linear.IntegerLinear`.

    Args:
        op: A calibrated convolution.
        backend: What multiplies its codes.

    Raises:
        NoIntegerForm: If it cannot be computed so; the text is the reason.
    """

    bias: Tensor | None

    def __init__(self, op: QuantConv2d, backend: Backend) -> None:
        super().__init__()
        self.coder = input_coder(op)
        integers, scale, _ = integer_weight(op)
        if not isinstance(self.coder, Uniform):
            raise NoIntegerForm(f'{type(self.coder).__name__} before a convolution')
        self.in_channels = op.in_channels
        self.out_channels = op.out_channels
        self.seen = [  # height and width of the input that one output sees
            dilation * (kernel - 1) + 1
            for kernel, dilation in zip(op.kernel_size, op.dilation, strict=True)
        ]
        self.padding = list(op._reversed_padding_repeated_twice)
        self.padding_mode = op.padding_mode
        self.zero_point = int(self.coder.zero)
        self.gain = scale * self.coder.scale
        bias = None if op.bias is None else op.bias.detach().clone()
        self.excess: Tensor | None = None
        self.convolution, self.path, above = backend.convolution(
            op, integers, self.coder
        )
        if above is not None:
            self.excess = (self.gain * above)[:, None, None]
            self.gain = with_more(self.gain, 1)
            bias = None if bias is None else with_more(bias, 0)
        self.register_buffer('bias', bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), in the dtype of the input."""
        if not len(x):
            raise QuantizationError('a convolution got a batch of 0 images')
        left, right, top, bottom = self.padding
        height, width = self.seen
        fits = x.ndim == 4 and x.shape[1] == self.in_channels
        if (
            not fits
            or x.shape[2] + top + bottom < height
            or x.shape[3] + left + right < width
        ):
            raise QuantizationError(
                f'a convolution of {self.in_channels} channels, whose outputs see'
                f' {height} x {width} inputs, got a tensor of shape {tuple(x.shape)};'
                ' it takes (batch, channels, height, width)'
            )
        codes = self._padded(self.encode(x.float()))
        out = self.convolution(codes, self.gain, self.bias)
        if self.excess is not None:
            out = torch.addcmul(
                out[:, : self.out_channels],
                out[:, self.out_channels, None],
                self.excess,
            )
        return out.to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of an input, in its layout."""
        if x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)
            return (
                encode(x.reshape(-1), None, self.coder)
                .view(x.shape)
                .permute(0, 3, 1, 2)
            )
        return encode(x.reshape(-1), None, self.coder).view(x.shape)

    def _padded(self, codes: Tensor) -> Tensor:
        if not any(self.padding):
            return codes
        if self.padding_mode == 'zeros':
            return F.pad(codes, self.padding, value=self.zero_point)
        return F.pad(codes.float(), self.padding, mode=self.padding_mode).to(
            torch.uint8
        )
