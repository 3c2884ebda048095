"""Whether a model in integers is the model that was simulated: both run in step, code by code.

What is float in both (norms, softmax, sums) differs in the last bit, so that now and then a value at the edge between two codes gets
the other one, and what comes after differs by whole steps. Two simulations, in float32 and in float64, differ in the same way. So the
simulation is run a second time with the codes of the integers, each of which must be the one next to its value, or lie across an edge
so near to it that rounding explains it; then the outputs must agree as floats do.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..layers import QuantOp
from ..quantizers import Quantizer
from .base import IntegerOp
from .coders import AdaLog, DeMax, Uniform
from .conv import IntegerConv2d
from .kernels import softmax_side
from .linear import IntegerLinear
from .matmul import IntegerMatMul


@dataclass
class Agreement:
    """How a model in integers agrees with its simulation on one input.

    Attributes:
        codes: Activations that were quantized.
        moved: Those of another code than in the simulation, which had the codes of the integers up to there.
        farthest: From the edge that it went across, of all of them, in steps.
        error: Relative error of the outputs, the simulation with the codes of the integers.
        apart: The same, each with its own codes.
    """

    codes: int = 0
    moved: int = 0
    farthest: float = 0.0
    error: float = 0.0
    apart: float = 0.0


Codes = tuple[Tensor, ...]
"""Of an operand: integers or table values; of DeMax codes, step, maxima and positions."""


def lockstep(simulated: nn.Module, integers: nn.Module, *inputs: Any) -> Agreement:
    """Runs a calibrated model and the same one in integers on the same input.

    Args:
        simulated: The calibrated model.
        integers: A copy of it after ``to_integer(copy, fuse=False)``.
        inputs: What both are called with.

    Raises:
        QuantizationError: If the second is not the first in integers, or is fused: then its codes cannot be seen.
    """
    ops = {name: op for name, op in simulated.named_modules() if isinstance(op, QuantOp)}
    converted = {name: op for name, op in integers.named_modules() if isinstance(op, IntegerOp)}
    if not converted or not set(converted) <= set(ops):
        raise QuantizationError('to run in step takes a calibrated model and its copy after to_integer(copy, fuse=False)')
    result, seen = Agreement(), defaultdict[str, list[Codes]](list)
    with torch.no_grad(), ExitStack() as stack:
        plain = tensors(simulated(*inputs))
        for name, op in converted.items():
            stack.enter_context(recorded(op, name, seen))
        found = tensors(integers(*inputs))
        for name, op in converted.items():
            for role, coder in coders(op).items():
                stack.enter_context(replaced(ops[name].quantizer(role), coder, seen[f'{name}.{role}'], result))
        stepped = tensors(simulated(*inputs))
    result.error, result.apart = relative(found, stepped), relative(found, plain)
    return result


def coders(op: IntegerOp) -> dict[str, Any]:
    """The coders of an operation's activations, by role."""
    if isinstance(op, IntegerMatMul):
        return {'left': op.left, 'right': op.right}
    assert isinstance(op, IntegerLinear | IntegerConv2d)
    return {'input': op.coder}


@contextmanager
def recorded(op: IntegerOp, name: str, seen: dict[str, list[Codes]]) -> Iterator[None]:
    """Keeps what an operation multiplies, by its name and role, one call after another."""
    method = {IntegerLinear: 'multiply', IntegerConv2d: '_padded', IntegerMatMul: 'forward'}[type(op)]
    original = getattr(op, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if isinstance(op, IntegerMatMul):
            for role, coder, operand in zip(('left', 'right'), (op.left, op.right), args, strict=True):
                operand = operand.float()
                codes = demax_codes(operand, coder) if isinstance(coder, DeMax) else (coder.integers(operand),)
                seen[f'{name}.{role}'].append(codes)
        else:
            codes = output if isinstance(op, IntegerConv2d) else args[0]
            seen[f'{name}.input'].append((codes.float() - op.coder.zero if isinstance(op.coder, Uniform) else codes,))
        return output

    setattr(op, method, call)
    try:
        yield
    finally:
        delattr(op, method)


@contextmanager
def replaced(quantizer: Quantizer, coder: Uniform | AdaLog | DeMax, seen: list[Codes], result: Agreement) -> Iterator[None]:
    """Has a quantizer give the values of codes that were seen, and compares them with its own input."""
    left = iter(seen)

    def forward(x: Tensor, before: Any = None) -> Tensor:
        x, codes = before(x) if before else x, next(left)
        codes = (codes[0].reshape(x.shape), *codes[1:])
        for position, code in pairs(x, codes, coder):
            beyond = (position - code).abs() - 0.5
            result.codes += code.numel()
            result.moved += int((beyond > 0).sum())
            result.farthest = max(result.farthest, float(beyond.max()))
        if isinstance(coder, DeMax):
            kept, step, maxima, positions = codes
            return (kept * step).scatter(-1, positions, maxima)
        return codes[0] * coder.scale

    quantizer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del quantizer.forward


def pairs(x: Tensor, codes: Codes, coder: Uniform | AdaLog | DeMax) -> Iterator[tuple[Tensor, Tensor]]:
    """Where values lie in steps of their codes, and the codes; a code is right if it is not farther away than half a step."""
    if isinstance(coder, Uniform):
        position = (x * coder.inverse).clamp(-coder.zero, coder.most - coder.zero)
        yield position, codes[0]
    elif isinstance(coder, AdaLog):
        position = ((x / coder.full).clamp(0, 1).log2() * coder.rate).clamp(max=coder.last)
        table = -coder.table[:-1].contiguous()  # ascending; neighbours may be equal
        first, behind = (torch.searchsorted(table, -codes[0], right=right) for right in (False, True))
        yield position, position.round().clamp(first, behind - 1)
    else:
        kept, step, maxima, positions = codes
        taken = x.gather(-1, positions)
        rest = x.scatter(-1, positions, 0)
        largest = rest.amax(-1, keepdim=True)
        unit = torch.where(step > 0, step, 1)
        yield (rest / unit).clamp(max=coder.most), kept
        yield (taken - rest.amax(-1, keepdim=True)).clamp(max=0) / unit, torch.zeros_like(taken)  # they are the largest
        if coder.half:
            for value, rounded in ((largest / coder.most, step), (taken, maxima)):
                spacing = torch.exp2(rounded.clamp(min=2.0**-14).log2().floor() - 10)
                yield value / spacing, rounded / spacing


def demax_codes(x: Tensor, coder: DeMax) -> Codes:
    """Codes and side data of probabilities."""
    codes, side = softmax_side(x, coder)
    return (codes, *side)


def tensors(output: Any) -> list[Tensor]:
    """Those of an output, in a sequence or alone."""
    return [output] if isinstance(output, Tensor) else list(output)


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error (norm of the difference over norm) of tensors."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
