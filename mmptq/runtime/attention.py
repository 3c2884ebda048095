"""What an attention computes between its layers, as numbers.

Each backend runs it in its own way.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .coders import AdaLog, Change, Coder, Uniform

FARTHEST = -80.0
"""Of a score from the largest: exp of less has denormal numbers, which take a CPU many
times as long; beside 1 they are nothing.
"""


class Attention(NamedTuple):
    """What an attention computes between its layers.

    Attributes:
        spans: Of queries, keys and values the zero that their steps are counted from,
            and the lowest and the highest integer, (heads, 1, 1) or () each.
        scale: What one of the integer scores is worth, (heads, 1, 1) or ().
        bias: Added to the scores, (heads, length, length), or for each window.
        keys: The dimension of scores and bias that keys are along, -1, or -2: then a
            vector of the CPU holds one key's scores of many queries, and no maximum or
            sum is taken within a vector, which is faster where rows are short.
        probabilities: Their coder.
        gain: What one of the integer sums of values is worth, (heads, 1, 1) or ().
        held: Columns whose sums float32 holds, of both products.
        change: Before the coder of the output.
        output: The coder of the next layer's input.
    """

    spans: tuple[tuple[Tensor, Tensor, Tensor], ...]
    scale: Tensor
    bias: Tensor | None
    keys: int
    probabilities: Coder
    gain: Tensor
    held: tuple[int, int]
    change: Change | None
    output: Uniform | AdaLog
