"""What is computed between integer products in torch, on any device: codes, sums of
floats, DeMax's side data.

Each is one pass over memory where ``torch.compile`` has a compiler.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .coders import AdaLog, Change, DeMax, Uniform

Function = TypeVar('Function', bound=Callable[..., Any])
Side = tuple[Tensor, Tensor, Tensor]
"""DeMax's step (..., rows, 1), and maxima and their positions (..., rows, maxima)."""


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler for ``torch.compile``; a line in the log if not."""
    found = any(
        shutil.which(name)
        for name in (os.environ.get('CXX', ''), 'g++', 'clang++')
        if name
    )
    if not found:
        logging.getLogger('mmengine').warning(
            'no C++ compiler (g++, clang++ or $CXX): '
            'what is between integer products runs unfused, '
            'which takes about twice as long'
        )
    return found


def fused(rows: int = 1) -> Callable[[Function], Function]:
    """A function of tensors, compiled when it is first called: once for each width, for
    any number of rows.

    Args:
        rows: How many of the arguments, the first ones, have rows; they are the first
            dimension.
    """

    def decorate(function: Function) -> Function:
        @functools.cache
        def compiled() -> Any:
            # Without precise casts, a rounding to float16 is optimized away.
            options = {'emulate_precision_casts': True}
            # Before torch 2.13 there is no limit to set but that of the whole process,
            # and what is beyond it runs uncompiled.
            limit = (
                {'recompile_limit': 256}
                if 'recompile_limit' in inspect.signature(torch.compile).parameters
                else {}
            )
            settings: dict[str, Any] = {'dynamic': False, 'options': options, **limit}
            return torch.compile(function, **settings)

        @functools.wraps(function)
        def call(x: Tensor, *args: Any) -> Any:
            if (
                torch.compiler.is_compiling() or not has_compiler() or not x.shape[0]
            ):  # part of a larger one
                return function(x, *args)
            for each in (x, *args[: rows - 1]):
                if each is not None:
                    torch._dynamo.maybe_mark_dynamic(each, 0)
            return compiled()(x, *args)

        return call  # type: ignore[return-value]

    return decorate


@fused()
def encode(x: Tensor, change: Change | None, coder: Uniform | AdaLog) -> Tensor:
    """Codes of rows (rows, channels), uint8; of AdaLog the table's values, float."""
    return coded(x, change, coder)


@fused()
def encode_normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    change: Change | None,
    coder: Uniform | AdaLog,
) -> Tensor:
    """Codes of the layer norm of rows, as :func:`encode` gives them."""
    return coded(
        F.layer_norm(x, x.shape[-1:], weight, bias, eps).float(), change, coder
    )


@fused()
def encode_normalized_and_copy(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """:func:`encode_normalized`, and a copy of the rows that costs no pass of its own."""
    return encode_normalized(x, *args), x.clone()


@fused()
def encode_merged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    change: Change | None,
    coder: Uniform | AdaLog,
) -> Tensor:
    """Codes of the layer norm of patches of a map.

    Args:
        x: Its lines of patches, (lines, 2, patches, 2 channels).
        weight: That of the layer norm, by row, column and channel of a patch, (4
            channels,).
        bias: The same.
        eps: That of the layer norm.
        change: See :func:`encode`.
        coder: See :func:`encode`.

    Returns:
        (lines * patches, 4 channels), as :func:`encode` gives them.
    """
    x = x.transpose(1, 2)
    shape = x.shape[-2:]
    normed = F.layer_norm(x, shape, weight.view(shape), bias.view(shape), eps).float()
    if change is not None:
        change = Change(*(each.expand(weight.shape).reshape(shape) for each in change))
    return coded(normed, change, coder).flatten(0, 1).flatten(1)


@fused()
def map_of_normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The layer norm of rows (rows, channels), with channels outermost: (channels,
    rows).
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).t().contiguous()


def coded(x: Tensor, change: Change | None, coder: Uniform | AdaLog) -> Tensor:
    """Codes of a changed tensor of any shape, as :func:`encode` gives them."""
    if change is not None:
        x = x * change.factor - change.shift
    return (
        coder.codes(x).to(torch.uint8)
        if isinstance(coder, Uniform)
        else coder.integers(x)
    )


def integer_product(left: Tensor, right: Tensor, held: int) -> Tensor:
    """The product of integers (..., rows, inner) and (..., inner, columns), in float32,
    of which it holds sums of so many columns.
    """
    if left.shape[-1] <= held:
        return left @ right
    pairs = zip(left.split(held, -1), right.split(held, -2), strict=True)
    return (
        torch.stack([(a @ b).to(torch.int32) for a, b in pairs])
        .sum(0, dtype=torch.int32)
        .to(left.dtype)
    )


def softmax_side(x: Tensor, coder: DeMax) -> tuple[Tensor, Side]:
    """DeMax's codes of probabilities (..., rows, length), and their side data."""
    length = x.shape[-1]
    places = torch.arange(length, device=x.device, dtype=x.dtype)
    taken, positions, gone = [], [], 0.0 if coder.maxima == 1 else -1.0
    for _ in range(min(coder.maxima, length)):
        maximum = x.amax(-1, keepdim=True)
        position = torch.where(x == maximum, places, float(length)).amin(
            -1, keepdim=True
        )  # vectorized, as argmax is not
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
    codes = torch.round(x * torch.where(usable, step, 1.0).reciprocal()).clamp(
        0, coder.most
    )
    return codes, (step, maxima, torch.cat(positions, -1))


@fused(rows=5)
def with_maxima(
    product: Tensor, values: Tensor, step: Tensor, maxima: Tensor, positions: Tensor
) -> Tensor:
    """DeMax's product: codes times values, by the step of the row, and for each maximum
    the row of values that it gathers.
    """
    product = product * step
    for number in range(positions.shape[-1]):
        index = positions[..., number, None].expand(product.shape)
        product = product + maxima[..., number, None] * values.gather(-2, index)
    return product
