"""What is computed between integer products, one pass over memory each where ``torch.compile`` has a compiler."""
from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .coders import AdaLog, Change, Coder, DeMax, Uniform, Whole

Function = TypeVar('Function', bound=Callable[..., Any])
Side = tuple[Tensor, Tensor, Tensor]
"""DeMax's step (..., rows, 1), and maxima and their positions (..., rows, maxima)."""


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler for ``torch.compile``; a line in the log if not."""
    found = any(shutil.which(name) for name in (os.environ.get('CXX', ''), 'g++', 'clang++') if name)
    if not found:
        logging.getLogger('mmengine').warning('no C++ compiler (g++, clang++ or $CXX): what is between integer products runs unfused, '
                                              'which takes about twice as long')
    return found


def fused(function: Function) -> Function:
    """A function of tensors, compiled when it is first called: once for each width, for any number of rows (the first dimension)."""
    @functools.cache
    def compiled() -> Any:
        # Without precise casts, a rounding to float16 is optimized away.
        options = {'emulate_precision_casts': True}
        return torch.compile(function, dynamic=False, recompile_limit=256, options=options)  # type: ignore[call-overload]

    @functools.wraps(function)
    def call(x: Tensor, *args: Any) -> Any:
        if not has_compiler() or not x.shape[0]:
            return function(x, *args)
        for each in (x, *args):
            if isinstance(each, Tensor) and each.ndim == x.ndim and each.shape[0] == x.shape[0]:
                torch._dynamo.maybe_mark_dynamic(each, 0)
        return compiled()(x, *args)

    return call  # type: ignore[return-value]


@fused
def encode(x: Tensor, change: Change | None, coder: Uniform | AdaLog) -> Tensor:
    """Codes of rows (rows, channels), uint8; of AdaLog the table's values, float."""
    return _coded(x, change, coder)


def _coded(x: Tensor, change: Change | None, coder: Uniform | AdaLog | Whole) -> Tensor:
    if change is not None:
        x = x * change.factor - change.shift
    return coder.codes(x).to(torch.uint8) if isinstance(coder, Uniform) else coder.integers(x)


@fused
def split_heads(x: Tensor, scale: float, coders: tuple[Uniform, Uniform, Uniform]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as integers.

    Args:
        x: (windows, length, 3, heads, channels).
        scale: That of the queries.
        coders: Of queries, keys and values.

    Returns:
        Each (windows, heads, length, channels).
    """
    q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
    query, key, value = coders
    return query.integers(q * scale).contiguous(), key.integers(k).contiguous(), value.integers(v).contiguous()


@fused
def softmax(scores: Tensor, scale: Tensor, bias: Tensor | None, regions: Tensor | None, coder: Coder) -> tuple[Tensor, Side | None]:
    """Integers of attention probabilities.

    Args:
        scores: Integer products of queries and keys, (windows, heads, length, length).
        scale: What one is worth, (heads, 1, 1) or ().
        bias: Added, (heads, length, length).
        regions: Of each token, (windows, length): those of different regions do not see each other.
        coder: Of the probabilities.
    """
    scores = scores * scale
    if bias is not None:
        scores = scores + bias
    if regions is not None:
        apart = regions[:, None, :, None] != regions[:, None, None, :]
        scores = scores + torch.where(apart, -100.0, 0.0)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    probabilities = powers * powers.sum(-1, keepdim=True).reciprocal()
    if isinstance(coder, DeMax):
        return softmax_side(probabilities, coder)
    return coder.integers(probabilities), None


def softmax_side(x: Tensor, coder: DeMax) -> tuple[Tensor, Side]:
    """DeMax's codes of probabilities (..., rows, length), and their side data."""
    length = x.shape[-1]
    places = torch.arange(length, device=x.device, dtype=x.dtype)
    taken, positions, gone = [], [], 0.0 if coder.maxima == 1 else -1.0
    for _ in range(min(coder.maxima, length)):
        maximum = x.amax(-1, keepdim=True)
        position = torch.where(x == maximum, places, float(length)).amin(-1, keepdim=True)  # vectorized, as argmax is not
        x = torch.where(places == position, gone, x)
        taken.append(maximum)
        positions.append(position.clamp(max=length - 1).to(torch.int64))
    if coder.maxima > 1:
        x = x.clamp(min=0)
    step = x.amax(-1, keepdim=True) / coder.most
    maxima = torch.cat(taken, -1)
    if coder.half:
        step, maxima = step.half().float(), maxima.half().float()
    usable = step > torch.finfo(torch.float32).tiny
    step = torch.where(usable, step, 0.0)
    codes = torch.round(x * torch.where(usable, step, 1.0).reciprocal()).clamp(0, coder.most)
    return codes, (step, maxima, torch.cat(positions, -1))


@fused
def with_maxima(product: Tensor, values: Tensor, side: Side) -> Tensor:
    """DeMax's product: codes times values, by the step of the row, and for each maximum the row of values that it gathers."""
    step, maxima, positions = side
    product = product * step
    for number in range(positions.shape[-1]):
        index = positions[..., number, None].expand(product.shape)
        product = product + maxima[..., number, None] * values.gather(-2, index)
    return product


@fused
def merge_heads(x: Tensor, scale: Tensor, change: Change | None, coder: Uniform | AdaLog | Whole) -> Tensor:
    """Codes for what reads the attention's output.

    Args:
        x: Integer products of probabilities and values, (windows, heads, length, channels).
        scale: What one is worth, (heads, 1, 1) or ().
        change: Before the coder.
        coder: Of the next layer's input.

    Returns:
        (windows, length, heads * channels), uint8; of AdaLog and float input float.
    """
    x = (x * scale).transpose(1, 2)
    return _coded(x.reshape(x.shape[0], x.shape[1], -1), change, coder)
