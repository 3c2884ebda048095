"""oneDNN's convolution of uint8 codes and an int8 weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers import QuantConv2d
from ..errors import NoIntegerForm
from .product import Packed


class OneDnnConvolution:
    """oneDNN's uint8 times int8 (:class:`mmptq.runtime.backend.Convolution`).

    Args:
        op: Says stride, dilation and groups.
        weight: int8, (out, in / groups, height, width).
        zero_point: Of the codes.

    Raises:
        NoIntegerForm: If its sums are not those of a convolution in float64, which is
            tried once.
    """

    def __init__(self, op: QuantConv2d, weight: Tensor, zero_point: int) -> None:
        self.stride, self.dilation, self.groups = (
            list(op.stride),
            list(op.dilation),
            op.groups,
        )
        self.zero_point = zero_point
        # Columns of the input that one output sees.
        self.columns = op.dilation[1] * (op.kernel_size[1] - 1) + 1
        ones = torch.ones(len(weight))
        packed = torch.ops.onednn.qconv_prepack(
            weight,
            ones,
            1.0,
            zero_point,
            self.stride,
            [0, 0],
            self.dilation,
            self.groups,
            None,
        )
        self.packed = Packed(packed)
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int64)
        self._check(weight, ones)

    def _check(self, weight: Tensor, ones: Tensor) -> None:
        """That the sums are right, on a map of 4 x 4 outputs.

        With AMX, oneDNN 3.12's are not for some kernels as wide as their stride.
        """
        sides = zip(weight.shape[2:], self.stride, self.dilation, strict=True)
        size = [
            dilation * (kernel - 1) + 1 + 3 * stride
            for kernel, stride, dilation in sides
        ]
        shape = (1, weight.shape[1] * self.groups, *size)
        codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
        expected = F.conv2d(
            (codes - self.zero_point).double(),
            weight.double(),
            None,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )
        found = self(codes.to(torch.uint8), ones, None)
        if not torch.equal(found, expected.float()):
            raise NoIntegerForm('oneDNN has no exact product for its shape')

    def __call__(self, codes: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`mmptq.runtime.backend.Convolution`."""
        alone = codes.shape[3] < self.columns + self.stride[1]
        if alone:  # outputs of one column are wrong with AMX
            codes = F.pad(codes, (0, self.stride[1]))
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            codes.contiguous(memory_format=torch.channels_last),
            1.0,
            self.zero_point,
            self.packed.tensor,
            gain,
            self.weight_zero,
            bias,
            self.stride,
            [0, 0],
            self.dilation,
            self.groups,
            1.0,
            0,
            torch.float32,
            'none',
            [],
            '',
        )
        return out[..., :1] if alone else out
