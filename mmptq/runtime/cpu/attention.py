"""An attention between its layers, window by window, in passes that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import FARTHEST, Attention
from ..coders import AdaLog, Change, Coder, DeMax, Uniform
from ..kernels import Side, coded, fused, integer_product, softmax_side, with_maxima


def attend(x: Tensor, attention: Attention) -> Tensor:
    """Codes for the layer after an attention, from the steps of queries, keys and
    values.

    Args:
        x: uint8, (windows, length, 3, heads, channels).
        attention: Its parameters.

    Returns:
        (windows, length, heads * channels), uint8; of AdaLog float.
    """
    queries, keys, values = split_heads(x, attention.spans)
    left, right = (queries, keys) if attention.keys == -1 else (keys, queries)
    scores = integer_product(left, right.transpose(-1, -2), attention.held[0])
    probabilities, side = softmax(
        scores, attention.scale, attention.bias, attention.probabilities, attention.keys
    )
    product = integer_product(
        probabilities.transpose(attention.keys, -1), values, attention.held[1]
    )
    if side is not None:
        product = with_maxima(product, values, *side)
    return merge_heads(product, attention.gain, attention.change, attention.output)


attend_at_once = fused()(attend)
""":func:`attend` compiled as one.

Then the rows of DeMax's windows would be read from memory again and again.
"""


@fused()
def split_heads(
    x: Tensor, spans: tuple[tuple[Tensor, Tensor, Tensor], ...]
) -> tuple[Tensor, ...]:
    """Queries, keys and values as integers.

    Args:
        x: Their steps, uint8, (windows, length, 3, heads, channels).
        spans: See :class:`mmptq.runtime.attention.Attention`.

    Returns:
        Each (windows, heads, length, channels), float.
    """
    parts = zip(x.unbind(2), spans, strict=True)
    return tuple(
        (part.transpose(1, 2).float() - zero).clamp(low, high).contiguous()
        for part, (zero, low, high) in parts
    )


@fused()
def softmax(
    scores: Tensor, scale: Tensor, bias: Tensor | None, coder: Coder, keys: int
) -> tuple[Tensor, Side | None]:
    """Integers of attention probabilities, as the scores lie.

    Args:
        scores: Integer products of queries and keys, (windows, heads, length, length).
        scale: What one is worth, (heads, 1, 1) or ().
        bias: Added, (heads, length, length), or for each window.
        coder: Of the probabilities.
        keys: The dimension that keys are along, -1 for DeMax.
    """
    scores = scores * scale
    if bias is not None:
        scores = scores + bias
    scores = scores - scores.amax(keys, keepdim=True)
    powers = torch.where(
        scores > FARTHEST, scores, FARTHEST
    ).exp()  # torch.clamp takes a CPU twice as long
    if isinstance(coder, Uniform):
        steps = torch.round(
            powers * (powers * coder.scale).sum(keys, keepdim=True).reciprocal()
        )
        most = coder.most - coder.zero
        return torch.where(steps < most, steps, most), None  # none is below zero
    probabilities = powers * powers.sum(keys, keepdim=True).reciprocal()
    if isinstance(coder, DeMax):
        return softmax_side(probabilities, coder)
    return coder.integers(probabilities), None


@fused()
def merge_heads(
    x: Tensor, gain: Tensor, change: Change | None, coder: Uniform | AdaLog
) -> Tensor:
    """Codes of an attention's output, (windows, length, heads * channels), from integer
    sums (windows, heads, length, channels).
    """
    x = (x * gain).transpose(1, 2)
    return coded(x.reshape(x.shape[0], x.shape[1], -1), change, coder)
