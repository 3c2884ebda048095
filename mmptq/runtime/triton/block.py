"""Transformer blocks on a GPU, all images at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..blocks import IntegerBlock
from ..coders import Uniform
from ..errors import NoIntegerForm
from .attention import GpuAttention
from .kernels import KEYS
from .launch import tried
from .norm import GpuNorm
from .product import GpuProduct


class GpuBlock(IntegerBlock):
    """A block on a GPU: all images at once, seven passes over memory.

    Raises:
        NoIntegerForm: If one of its parts is not what the kernels are written for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in (self.proj, self.fc1):
            if not isinstance(layer.coder, Uniform):
                raise NoIntegerForm(
                    f'a kernel for {type(layer.coder).__name__} before a layer'
                )
        assert isinstance(self.qkv.coder, Uniform) and isinstance(
            self.fc1.coder, Uniform
        )
        self.first = GpuNorm(self.norm1, self.qkv.change, self.qkv.coder)
        self.second = GpuNorm(self.norm2, self.fc1.change, self.fc1.coder)
        self.between = GpuAttention(
            self.attention, self.heads, self.proj.in_features // self.heads, self.window
        )
        size = (
            (1, KEYS + 1) if self.window is None else (self.window[0], self.window[0])
        )
        tried(
            lambda: self._images(
                torch.zeros(
                    1, math.prod(size), self.qkv.in_features, device=self.padding.device
                ),
                size,
            )
        )

    def _images(self, x: Tensor, hw_shape: tuple[int, int] | None) -> Tensor:
        rows = x.view(-1, x.shape[-1]).float()
        codes = self.padding.new_empty(len(rows) + 1, self.qkv.in_features)
        codes[-1:] = self.padding
        self.first(rows, codes)
        attended = self.between(self.heads_steps(codes), len(x), hw_shape)
        product = self.proj.product
        assert isinstance(product, GpuProduct)
        rows = product.added(rows, attended, self.proj.gain, self.proj.offset)
        self._feed_forward(rows)
        return rows.view(x.shape).to(x.dtype)

    def _codes_for_feed_forward(self, x: Tensor) -> Tensor:
        codes = self.padding.new_empty(len(x), self.fc1.in_features)
        self.second(x, codes)
        return codes
