"""What a search of one quantizer per channel needs of all tokens: each channel's tails
whole, and a sample of what lies between.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .objective import Screen, own_error


class Channels:
    """The values of each channel of an activation, thinned, over several calls.

    Of each call the ``tail`` largest and smallest values of a channel are kept, since
    ranges are decided there, and ``middle`` random ones of the rest, each of which
    stands for many.

    Args:
        calls: Number of calls to come.
        points: Values to keep of each channel over all calls, about.
        seed: Of the sample.
    """

    def __init__(self, calls: int, points: int, seed: int) -> None:
        self.tail = max(1, points // calls // 4)
        self.middle = 2 * self.tail
        self.generator = Generator().manual_seed(seed)
        self.values: list[Tensor] = []
        self.random: list[Tensor] = []
        self.counts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Adds the tokens of one call, (..., channels)."""
        x = x.reshape(-1, x.shape[-1]).t()  # (channels, tokens)
        tokens = x.shape[1]
        if tokens <= 2 * self.tail + self.middle:
            self.values.append(x.contiguous())
            self.random.append(self.values[-1])
            self.counts.append(torch.ones_like(x))
            return
        high, low = (
            x.topk(self.tail, 1).values,
            x.topk(self.tail, 1, largest=False).values,
        )
        middle = x[
            :,
            torch.randint(tokens, (self.middle,), generator=self.generator).to(
                x.device
            ),
        ]
        inside = (middle < high[:, -1:]) & (middle > low[:, -1:])
        counts = (
            inside * (tokens - 2 * self.tail) / inside.sum(1, keepdim=True).clamp(min=1)
        )
        self.values.append(torch.cat([low, middle, high], 1))
        self.random.append(torch.cat([low[:, :1], middle, high[:, :1]], 1))
        self.counts.append(
            torch.cat(
                [torch.ones_like(low), counts.to(x.dtype), torch.ones_like(high)], 1
            )
        )

    def spread(self) -> Tensor:
        """A random sample of each channel's values, and its extremes, (channels,
        values): what a grid is to cover.
        """
        return torch.cat(self.random, 1)

    def screen(self) -> Screen:
        """The squared error of rounding each channel by itself."""
        return own_error(
            torch.cat(self.values, 1)[:, None, None], torch.cat(self.counts, 1)[:, None]
        )

    def zero(self) -> Tensor:
        """Channels that were always zero, (channels,), bool."""
        return (torch.cat(self.values, 1) == 0).all(1)
