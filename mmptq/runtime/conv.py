"""Convolutions as integer products."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizationError
from ..layers import QuantConv2d
from .base import IntegerOp, has_onednn, has_triton, input_coder, int8_parts, integer_weight, with_more, with_sums
from .coders import Uniform
from .errors import NoIntegerForm
from .kernels import encode
from .products import Packed, Product


class IntegerConv2d(IntegerOp):
    """A convolution: uint8 codes times int8 weights, int32 sums; weights as in :class:`IntegerLinear`.

    By oneDNN; on a GPU as a product of the weight with receptive fields, which are copied for it.
    """

    bias: Tensor | None

    def __init__(self, op: QuantConv2d) -> None:
        super().__init__()
        self.coder = input_coder(op)
        integers, scale, _ = integer_weight(op)
        if not isinstance(self.coder, Uniform):
            raise NoIntegerForm('AdaLog before a convolution')
        self.stride, self.dilation, self.groups = list(op.stride), list(op.dilation), op.groups
        self.in_channels, self.out_channels, self.kernel_size = op.in_channels, op.out_channels, op.kernel_size
        self.padding, self.padding_mode = list(op._reversed_padding_repeated_twice), op.padding_mode
        self.zero_point = int(self.coder.zero)
        self.gain = scale * self.coder.scale
        self.register_buffer('bias', None if op.bias is None else op.bias.detach().clone())
        self.excess: Tensor | None = None
        self.product: Product | None = None
        if has_triton(op.weight.device):
            if op.groups > 1:
                raise NoIntegerForm('a convolution in groups on a GPU')
            from .gpu import GpuProduct
            self.path, self.product = 'int8, by Triton', GpuProduct(integers.flatten(1), self.zero_point, self.coder.most)
        elif has_onednn(op.weight.device):
            self._prepare(op, integers)
        else:
            raise NoIntegerForm('integer convolutions need oneDNN and a CPU with VNNI')

    def _prepare(self, op: QuantConv2d, integers: Tensor) -> None:
        """For oneDNN."""
        parts = int8_parts(integers)
        if len(parts) > 1 and op.groups > 1:
            raise NoIntegerForm('a convolution in groups with a weight that int8 does not hold')
        if len(parts) == 1:
            self.path, weight = 'int8', parts[0]
        else:
            self.path = 'int8, weight and sums of the codes'
            weight, above = with_sums(op, integers)
            self.excess = (self.gain * above)[:, None, None]
            self.gain = with_more(self.gain, 1)
            self.bias = None if self.bias is None else with_more(self.bias, 0)
        self.columns = op.dilation[1] * (op.kernel_size[1] - 1) + 1  # that one output sees
        self.packed = Packed(torch.ops.onednn.qconv_prepack(
            weight, torch.ones_like(self.gain), 1.0, self.zero_point, self.stride, [0, 0], self.dilation, self.groups, None))
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int64)
        self._check(weight)

    def _check(self, weight: Tensor) -> None:
        """That the sums are right, on a map of 4 x 4 outputs: with AMX, oneDNN 3.12's are not for some kernels as wide as their stride."""
        size = [dilation * (kernel - 1) + 1 + 3 * stride
                for kernel, stride, dilation in zip(weight.shape[2:], self.stride, self.dilation, strict=True)]
        codes = torch.randint(0, 256, (1, weight.shape[1] * self.groups, *size), generator=torch.Generator().manual_seed(0))
        expected = F.conv2d((codes - self.zero_point).double(), weight.double(), None, self.stride, 0, self.dilation, self.groups)
        found = self._sums(codes.to(torch.uint8), torch.ones_like(self.gain), None)
        if not torch.equal(found, expected.float()):
            raise NoIntegerForm('oneDNN has no exact product for its shape')

    def _sums(self, codes: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """``sums gain + bias`` of padded codes."""
        if self.product is not None:
            return torch.cat([self._image_sums(self.product, image[None], gain, bias) for image in codes])
        alone = codes.shape[3] < self.columns + self.stride[1]
        if alone:  # outputs of one column are wrong with AMX
            codes = F.pad(codes, (0, self.stride[1]))
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            codes.contiguous(memory_format=torch.channels_last), 1.0, self.zero_point, self.packed.tensor, gain, self.weight_zero, bias,
            self.stride, [0, 0], self.dilation, self.groups, 1.0, 0, torch.float32, 'none', [], '')
        return out[..., :1] if alone else out

    def _image_sums(self, product: Product, codes: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """Those of one image, by a product with its receptive fields."""
        for number, (kernel, stride, dilation) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            codes = codes.unfold(2 + number, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        fields = codes.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (1, height, width, channels * kernel height * kernel width)
        return product(fields.flatten(0, 2), gain, bias).view(*fields.shape[:3], -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), in the dtype of the input."""
        if not len(x):
            raise QuantizationError('a convolution got a batch of 0 images')
        seen = [dilation * (kernel - 1) + 1 for kernel, dilation in zip(self.kernel_size, self.dilation, strict=True)]
        left, right, top, bottom = self.padding
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] + top + bottom < seen[0] or x.shape[3] + left + right < seen[1]:
            raise QuantizationError(f'a convolution of {self.in_channels} channels, whose outputs see {seen[0]} x {seen[1]} inputs, got a '
                                    f'tensor of shape {tuple(x.shape)}; it takes (batch, channels, height, width)')
        out = self._sums(self._padded(self.encode(x.float())), self.gain, self.bias)
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
