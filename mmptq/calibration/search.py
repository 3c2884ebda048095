"""The search: one operand's quantizer changes, the rest stays, and the output that errs least decides."""
from __future__ import annotations

import torch
from torch import Tensor

from ..layers import QuantOp
from ..quantizers import Params
from .capture import Samples


def output_errors(op: QuantOp, role: str, samples: Samples, candidates: Params) -> Tensor:
    """Squared error of an operation's output for each candidate of one operand's parameters.

    The other operands pass through their quantizers as they are; the reference is the float output.

    Args:
        op: The operation.
        role: The operand that varies.
        samples: Its activations.
        candidates: Parameters with a leading dimension of n candidates.

    Returns:
        Shape (n, groups), float64: groups are those of the quantizer (output channels, heads), or 1.
    """
    index = op.roles.index(role)
    quantizer = op.quantizer(role)
    count = next(iter(candidates.values())).shape[0]
    axis = op.output_axes.get(role) if quantizer.axis is not None else None
    errors: Tensor | None = None
    for activations in samples:
        operands = op.operands(*activations)
        target = op.compute(*operands)
        present = [op.quantizer(name)(operand) for name, operand in zip(op.roles, operands, strict=True)]
        rest = tuple(d for d in range(-target.ndim, 0) if d != axis)
        if errors is None:
            errors = target.new_zeros((count, 1 if axis is None else target.shape[axis]), dtype=torch.float64)
        for number in range(count):
            present[index] = quantizer.fake_quantize(operands[index], **{k: v[number] for k, v in candidates.items()})
            errors[number] += (op.compute(*present) - target).square_().sum(rest, dtype=torch.float64).view(-1)
    assert errors is not None, 'an operation without samples cannot be searched'
    return errors


@torch.no_grad()
def search(op: QuantOp, role: str, samples: Samples, count: int) -> None:
    """Sets one operand's quantizer to the candidate with the least output error, each channel or head by itself.

    Args:
        op: The operation; its other quantizers stay as they are, float where not calibrated.
        role: The operand.
        samples: Activations of the operation.
        count: Number of candidates, about.
    """
    index = op.roles.index(role)
    quantizer = op.quantizer(role)
    values = [quantizer.grouped(op.operands(*activations)[index]) for activations in samples]
    values = values[:1] if role == 'weight' else values
    candidates = {name: quantizer.ungrouped(value) for name, value in quantizer.candidates(torch.cat(values, 1), count).items()}
    best = output_errors(op, role, samples, candidates).argmin(0)  # (groups,)
    quantizer.set(**{name: _choose(value, best) for name, value in candidates.items()})


def _choose(value: Tensor, best: Tensor) -> Tensor:
    """Of candidates (n, groups, 1, ...) or (n,), the best of each group."""
    if value.ndim == 1:
        return value[best[0]]
    return value[best, torch.arange(len(best), device=value.device)]
