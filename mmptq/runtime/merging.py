"""Swin's patch merging and output norms in integers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import encode_merged, map_of_normalized
from .linear import IntegerLinear


class IntegerMerging(nn.Module):
    """Swin's patch merging; called as mmdet's and mmsegmentation's ``PatchMerging``.

    Args:
        merging: The module.
        reduction: Its layer, which takes inputs in the order of :func:`merged_order`.
    """

    def __init__(self, merging: Any, reduction: IntegerLinear) -> None:
        super().__init__()
        order = merged_order(merging.in_channels)
        self.norm = nn.LayerNorm(merging.norm.normalized_shape, merging.norm.eps)
        self.norm.weight, self.norm.bias = (
            nn.Parameter(value.detach()[order])
            for value in (merging.norm.weight, merging.norm.bias)
        )
        self.reduction = reduction

    def forward(
        self, x: Tensor, input_size: tuple[int, int]
    ) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (batch, tokens / 4, 2 channels) and the size of their map."""
        height, width = input_size
        maps = x.view(len(x), height, width, -1)
        if height % 2 or width % 2:
            maps = F.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
        size = maps.shape[1] // 2, maps.shape[2] // 2
        lines = maps.reshape(len(x) * size[0], 2, size[1], -1)
        torch._dynamo.maybe_mark_dynamic(lines, 2)
        norm, reduction = self.norm, self.reduction
        codes = encode_merged(
            lines, norm.weight, norm.bias, norm.eps, reduction.change, reduction.coder
        )
        return reduction.multiply(codes).view(len(x), -1, reduction.out_features), size


def merged_order(channels: int) -> Tensor:
    """For inputs of patch merging by row, column and channel of a patch, where they are
    by channel, row and column, (4 channels,).
    """
    return torch.arange(4 * channels).view(channels, 2, 2).permute(1, 2, 0).flatten()


class MapNorm(nn.Module):
    """A layer norm whose output is made a map, channels outermost.

    It is so in memory, and only its shape is that of tokens.

    Args:
        norm: The layer norm.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, tokens, channels)."""
        return joined(
            [
                map_of_normalized(
                    tokens, self.norm.weight, self.norm.bias, self.norm.eps
                )[None]
                for tokens in x
            ]
        ).transpose(1, 2)


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors one after another; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
