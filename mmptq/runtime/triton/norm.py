"""Codes of a layer norm on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..coders import Change, Uniform
from .kernels import encode_normalized_kernel
from .launch import launch, power_of_two, vectors


class GpuNorm:
    """Codes of a layer norm.

    Args:
        norm: The layer norm.
        change: Of its output.
        coder: Of that.
    """

    def __init__(
        self, norm: nn.LayerNorm, change: Change | None, coder: Uniform
    ) -> None:
        self.channels, self.eps = norm.normalized_shape[0], norm.eps
        ones, zeros = (
            value(self.channels, device=coder.scale.device)
            for value in (torch.ones, torch.zeros)
        )
        self.vectors = (
            ones if norm.weight is None else norm.weight.detach(),
            zeros if norm.bias is None else norm.bias.detach(),
            *vectors(change, ones),
        )
        self.coder = float(coder.inverse), float(coder.zero), float(coder.most)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """From rows (rows, channels), contiguous float32, to uint8 in the first rows of
        ``out``.
        """
        width = power_of_two(self.channels)
        rows = max(1, 4096 // width)
        launch(
            encode_normalized_kernel,
            (math.ceil(len(x) / rows),),
            x,
            *self.vectors,
            out,
            len(x),
            self.eps,
            *self.coder,
            self.channels,
            width,
            rows,
            num_warps=4,
        )
