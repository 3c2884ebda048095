"""Whether a model in integers is the model that was simulated: both run in step, code
by code.

What is float in both (norms, softmax, sums) differs in the last bit, so that now and
then a value at the edge between two codes gets the other one, and what comes after
differs by whole steps. Two simulations, in float32 and in float64, differ in the same
way. So the simulation is run a second time with the codes of the integers, each of
which must be the one next to its value, or lie across an edge so near to it that
rounding explains it; then the outputs must agree as floats do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..layers import QuantOp
from ..quantizers import Quantizer
from .base import IntegerOp
from .blocks import IntegerBlock
from .coders import AdaLog, DeMax, Uniform
from .conv import IntegerConv2d
from .convert import check_ready
from .kernels import softmax_side
from .linear import IntegerLinear
from .matmul import IntegerMatMul
from .merging import IntegerMerging, MapNorm


@dataclass
class Agreement:
    """How a model in integers agrees with its simulation on one input. NaN, where one
    of them has that.

    Attributes:
        codes: Activations that were quantized.
        moved: Those of another code than in the simulation, which had the codes of the
            integers up to there.
        farthest: From the edge that it went across, of all of them, in steps.
        values: Largest difference between what a code is worth in both, over the
            largest value of its tensor, of those that did not move.
        error: Relative error of the outputs, the simulation with the codes of the
            integers.
        apart: The same, each with its own codes.
    """

    codes: int = 0
    moved: int = 0
    farthest: float = 0.0
    values: float = 0.0
    error: float = 0.0
    apart: float = 0.0


Seen = tuple[Tensor, ...]
"""Of an operand: integers or table values; of DeMax codes, step, maxima and positions.
"""

SAME = 1e-5
"""Values that differ by less, over the largest of their tensor, are of the same code.
"""


def lockstep(simulated: nn.Module, integers: nn.Module, *inputs: Any) -> Agreement:
    """Runs a calibrated model and the same one in integers on the same input.

    Args:
        simulated: The calibrated model.
        integers: A copy of it after ``to_integer(copy, fuse=False)``.
        inputs: What both are called with.

    Raises:
        QuantizationError: If the first is not a calibrated model in evaluation mode, if
            the second is not that in integers, or is fused: then its codes cannot be
            seen; if they call their operations differently often.
    """
    ops = {
        name: op for name, op in simulated.named_modules() if isinstance(op, QuantOp)
    }
    converted = {
        name: op for name, op in integers.named_modules() if isinstance(op, IntegerOp)
    }
    fused = any(
        isinstance(module, IntegerBlock | IntegerMerging | MapNorm)
        for module in integers.modules()
    )
    if fused or not converted or not set(converted) <= set(ops):
        raise QuantizationError(
            'to run in step takes a calibrated model and its copy after'
            ' to_integer(copy, fuse=False)'
        )
    check_ready(simulated, ops)
    result, seen = Agreement(), defaultdict[str, list[Seen]](list)
    with torch.no_grad(), ExitStack() as stack:
        plain = tensors(simulated(*inputs))
        for name, op in converted.items():
            stack.enter_context(recorded(op, name, seen))
        found = tensors(integers(*inputs))
        for name, op in converted.items():
            for role, coder in coders(op).items():
                stack.enter_context(
                    replaced(
                        ops[name].quantizer(role), coder, f'{name}.{role}', seen, result
                    )
                )
        stepped = tensors(simulated(*inputs))
    left = [name for name, codes in seen.items() if codes]
    if left:
        raise QuantizationError(
            f'{left[0]} is called more often in integers than in the simulation'
        )
    result.error, result.apart = relative(found, stepped), relative(found, plain)
    return result


def coders(op: IntegerOp) -> dict[str, Any]:
    """The coders of an operation's activations, by role."""
    if isinstance(op, IntegerMatMul):
        return {'left': op.left, 'right': op.right}
    assert isinstance(op, IntegerLinear | IntegerConv2d)
    return {'input': op.coder}


@contextmanager
def recorded(op: IntegerOp, name: str, seen: dict[str, list[Seen]]) -> Iterator[None]:
    """Keeps what an operation multiplies, by its name and role, one call after another."""
    method = {
        IntegerLinear: 'multiply',
        IntegerConv2d: '_padded',
        IntegerMatMul: 'forward',
    }[type(op)]
    original = getattr(op, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if isinstance(op, IntegerMatMul):
            for role, coder, operand in zip(
                ('left', 'right'), (op.left, op.right), args, strict=True
            ):
                operand = operand.float()
                codes = (
                    demax_codes(operand, coder)
                    if isinstance(coder, DeMax)
                    else (coder.integers(operand),)
                )
                seen[f'{name}.{role}'].append(codes)
        else:
            codes = output if isinstance(op, IntegerConv2d) else args[0]
            seen[f'{name}.input'].append(
                (
                    (
                        codes.float() - op.coder.zero
                        if isinstance(op.coder, Uniform)
                        else codes
                    ),
                )
            )
        return output

    setattr(op, method, call)
    try:
        yield
    finally:
        delattr(op, method)


@contextmanager
def replaced(
    quantizer: Quantizer,
    coder: Uniform | AdaLog | DeMax,
    name: str,
    seen: dict[str, list[Seen]],
    result: Agreement,
) -> Iterator[None]:
    """Has a quantizer give the values of codes that were seen, and compares them with
    its own input and values.
    """
    original = quantizer.forward

    def forward(x: Tensor, before: Any = None) -> Tensor:
        if not seen[name]:
            raise QuantizationError(
                f'{name} is called more often in the simulation than in integers'
            )
        own, codes = original(x, before), seen[name].pop(0)
        x, codes = before(x) if before else x, (codes[0].reshape(x.shape), *codes[1:])
        values = (
            codes[0] * coder.scale
            if not isinstance(coder, DeMax)
            else (codes[0] * codes[1]).scatter(-1, codes[3], codes[2])
        )
        apart = (values - own).abs() / own.abs().amax().clamp(
            min=torch.finfo(own.dtype).tiny
        )
        edge = torch.zeros_like(x, dtype=torch.bool)  # at one or across it
        for position, code in pairs(x, codes, coder):
            beyond = (position - code).abs() - 0.5
            moved = ~(beyond <= 0)
            if moved.shape == x.shape:
                moved |= (beyond == 0) & (apart > SAME)
                edge |= moved
            else:
                edge |= (beyond >= 0).any(-1, keepdim=True)  # of a row's side data
            result.codes += code.numel()
            result.moved += int(moved.sum())
            result.farthest = largest(result.farthest, beyond)
        result.values = largest(result.values, apart.masked_fill(edge, 0))
        return values

    quantizer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del quantizer.forward


def pairs(
    x: Tensor, codes: Seen, coder: Uniform | AdaLog | DeMax
) -> Iterator[tuple[Tensor, Tensor]]:
    """Where values lie in steps of their codes, and the codes; a code is right if it is
    not farther away than half a step.
    """
    return POSITIONS[type(coder)](x, codes, coder)


def uniform_positions(
    x: Tensor, codes: Seen, coder: Uniform
) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`pairs` of steps of one size."""
    position = (x * coder.inverse).clamp(-coder.zero, coder.most - coder.zero)
    yield position, codes[0]


def adalog_positions(
    x: Tensor, codes: Seen, coder: AdaLog
) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`pairs` of steps of a logarithm."""
    position = ((x / coder.full).clamp(0, 1).log2() * coder.rate).clamp(max=coder.last)
    table = -coder.table[:-1].contiguous()  # ascending; neighbours may be equal
    first, behind = (
        torch.searchsorted(table, -codes[0], right=right) for right in (False, True)
    )
    yield position, position.round().clamp(first, behind - 1)


def demax_positions(
    x: Tensor, codes: Seen, coder: DeMax
) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`pairs` of a row's codes, of its maxima, and of both as float16 where they
    are rounded to it.
    """
    kept, step, maxima, positions = codes
    taken = x.gather(-1, positions)
    rest = x.scatter(-1, positions, 0)
    unit = torch.where(step > 0, step, 1)
    yield (
        (rest * unit.reciprocal()).clamp(max=coder.most),
        kept,
    )  # as the simulation rounds
    # They are the largest: past the edge, by what it is larger, where one of the rest
    # is.
    yield (
        (0.5 + (rest.amax(-1, keepdim=True) - taken) / unit).clamp(min=0),
        torch.zeros_like(taken),
    )
    if coder.half:
        for value, rounded in (
            (rest.amax(-1, keepdim=True) / coder.most, step),
            (taken, maxima),
        ):
            spacing = torch.exp2(rounded.clamp(min=2.0**-14).log2().floor() - 10)
            yield value / spacing, rounded / spacing


POSITIONS: dict[
    type, Callable[[Tensor, Seen, Any], Iterator[tuple[Tensor, Tensor]]]
] = {Uniform: uniform_positions, AdaLog: adalog_positions, DeMax: demax_positions}
"""Where values lie in steps of their codes, by the class of the coder."""


def demax_codes(x: Tensor, coder: DeMax) -> Seen:
    """Codes and side data of probabilities."""
    codes, side = softmax_side(x, coder)
    return (codes, *side)


def tensors(output: Any) -> list[Tensor]:
    """Those of an output, in a sequence or a mapping, or alone."""
    return (
        [output]
        if isinstance(output, Tensor)
        else list(output.values() if isinstance(output, Mapping) else output)
    )


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error (norm of the difference over norm) of tensors; NaN if
    one has it.
    """
    errors = [
        (a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def largest(so_far: float, values: Tensor) -> float:
    """Of a number and a tensor; NaN if one has it."""
    return float(torch.cat([values.new_tensor([so_far]), values.flatten()]).max())
