"""Swin's windows as indices of tokens, for each size of a map."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

APART = -100.0
"""Added to the score of tokens that do not see each other, as in Swin."""


class Group(NamedTuple):
    """Windows that are attended to in one way.

    Attributes:
        token: The token at each place, (windows, length); behind the last one stands
            the padding.
        mask: Added to the scores, (windows, 1, length, length); None: all places of a
            window see each other.
    """

    token: Tensor
    mask: Tensor | None

    def pieces(self, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens and mask of about so many windows at a time, as even as can be."""
        number = -(-len(self.token) // count)
        masks = [None] * number if self.mask is None else self.mask.tensor_split(number)
        return zip(self.token.tensor_split(number), masks, strict=True)


class Windows(NamedTuple):
    """How the tokens of an image are cut into windows.

    Attributes:
        groups: The windows.
        place: The place of each token among those of all groups, (tokens,).
    """

    groups: tuple[Group, ...]
    place: Tensor


@functools.lru_cache(64)
def places(
    height: int, width: int, size: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Swin's windows of a map (height, width): padded below and on the right, rolled by
    ``shift``, cut into ``size`` x ``size``.

    Returns:
        The token at each place of each window, behind the last one the padding; and its
        region, int32, (windows, size * size) both. Only tokens of the same region see
        each other.
    """
    rows, columns = -(-height // size) * size, -(-width // size) * size
    token = torch.full(
        (rows, columns), height * width, device=device, dtype=torch.int32
    )
    token[:height, :width] = torch.arange(height * width, device=device).view(
        height, width
    )
    region = torch.zeros_like(token)
    if shift:
        token = token.roll((-shift, -shift), (0, 1))
        row, column = (
            torch.zeros(length, device=device, dtype=torch.int32)
            for length in (rows, columns)
        )
        for line in (row, column):
            line[-size:-shift] = 1
            line[-shift:] = 2
        region = 3 * row[:, None] + column

    def cut(x: Tensor) -> Tensor:
        return (
            x.view(rows // size, size, columns // size, size)
            .transpose(1, 2)
            .reshape(-1, size * size)
        )

    return cut(token), cut(region)


@functools.lru_cache(64)
def shifted(
    height: int, width: int, size: int, shift: int, device: torch.device
) -> Windows:
    """:func:`places` in groups."""
    token, region = places(height, width, size, shift, device)
    apart = region[:, None, :, None] != region[:, None, None, :]
    edge = apart.flatten(1).any(1)
    groups = [Group(_twice(token[~edge]), None)] if not edge.all() else []
    if edge.any():
        groups.append(
            Group(_twice(token[edge]), torch.where(_twice(apart[edge]), APART, 0.0))
        )
    order = torch.cat([group.token for group in groups]).flatten()
    place = torch.empty(height * width + 1, dtype=torch.int64, device=device)
    place[order] = torch.arange(len(order), device=device)
    return Windows(tuple(groups), place[:-1])


def _twice(windows: Tensor) -> Tensor:
    """One window stands twice: what is compiled for any number is not for one."""
    return torch.cat([windows, windows]) if len(windows) == 1 else windows
