"""Convolutions on a GPU, as products of the weight with receptive fields."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layers import QuantConv2d
from ..products import Product


class FieldsConvolution:
    """A convolution as a product with receptive fields, which are copied for it.

    It is a :class:`mmptq.runtime.backend.Convolution`.

    Args:
        op: Says kernel, stride and dilation.
        product: Of codes with the weight's integers (out, in height width).
    """

    def __init__(self, op: QuantConv2d, product: Product) -> None:
        self.kernel_size = op.kernel_size
        self.stride = op.stride
        self.dilation = op.dilation
        self.product = product

    def __call__(self, codes: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`mmptq.runtime.backend.Convolution`."""
        images = [self._image(image[None], gain, bias) for image in codes]
        return torch.cat(images)

    def _image(self, codes: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """The sums of one image: its fields are all that memory has to hold."""
        sides = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        for number, (kernel, stride, dilation) in enumerate(sides):
            codes = codes.unfold(2 + number, dilation * (kernel - 1) + 1, stride)
            codes = codes[..., ::dilation]
        fields = codes.permute(0, 2, 3, 1, 4, 5).flatten(
            3
        )  # (1, height, width, inputs)
        sums = self.product(fields.flatten(0, 2), gain, bias)
        return sums.view(*fields.shape[:3], -1).permute(0, 3, 1, 2)
