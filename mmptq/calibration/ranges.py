"""Ranges by percentiles: of a few that clip more or less, the one of least squared
error (UQ-ViT's, RepQ-ViT's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantizers import Grid, Params, Quantizer
from ..quantizers.base import best_of
from .objective import own_error

PERCENTILES = (0.999, 0.9999, 0.99999)
"""Parts of the values that a range holds above and below, UQ-ViT's."""


@torch.no_grad()
def least_error(
    quantizer: Quantizer, values: Tensor, counts: Tensor | None = None
) -> Params:
    """The parameters of the percentile range whose squared error is least.

    Args:
        quantizer: Makes parameters of ranges.
        values: What will be quantized, (groups, values); a group has its own
            parameters.
        counts: What each value of a group counts, (values,), if not the same.

    Returns:
        Parameters, (groups,).
    """
    highs, lows = (
        tails(values, PERCENTILES, counts),
        -tails(-values, PERCENTILES, counts),
    )
    candidates = [
        quantizer.range_params(low, high) for low, high in zip(lows, highs, strict=True)
    ]
    params = {
        name: torch.stack([candidate[name] for candidate in candidates])
        for name in candidates[0]
    }
    screen = own_error(
        values[:, None, None], None if counts is None else counts[None, None]
    )
    return {
        name: value[0]
        for name, value in best_of(
            Grid(params, values[:, 0]), screen.errors(quantizer, params), 1
        ).items()
    }


def tails(
    values: Tensor, percentiles: Sequence[float], counts: Tensor | None = None
) -> Tensor:
    """Upper percentiles of each row: the largest value with no more than ``1 - p`` of
    the weight at or above those before it.

    Args:
        values: (rows, values).
        percentiles: ``p``, near 1.
        counts: What each value of a row counts, (values,), if not the same.

    Returns:
        (percentiles, rows).
    """
    size = values.shape[1]
    above = [
        (1 - p) * (size if counts is None else float(counts.sum())) for p in percentiles
    ]
    if counts is None:
        ranks = [min(size - 1, math.floor(mass)) for mass in above]
        ordered = values.topk(max(ranks) + 1, 1).values
        return torch.stack([ordered[:, rank] for rank in ranks])
    count = min(size, max(16, size // 256))
    while True:  # a few massive tokens, each of which counts little, may fill the tail
        ordered, index = values.topk(count, 1)
        mass = counts[index].cumsum(1)
        if count == size or bool((mass[:, -1] > max(above)).all()):
            break
        count = min(size, 4 * count)
    places = [
        (mass <= limit).sum(1, keepdim=True).clamp(max=count - 1) for limit in above
    ]
    return torch.stack([ordered.gather(1, place)[:, 0] for place in places])
