"""FPCS, the fast progressive combining search (AdaLog, ECCV 2024), over any quantizer's candidates and refinement."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import QuantOp
from ..quantizers import Grid, Params, Quantizer
from ..quantizers.base import best_of
from .capture import Samples
from .objective import Gram, Objective, Screen, by_channel, own_error, screen, shared_by_channels


@dataclass(frozen=True)
class FPCS:
    """How finely is searched.

    Attributes:
        steps: Grids, the first included.
        width: Candidates that survive a step.
        candidates: Size of a grid.
        rank: Columns of the screen's factor, see :class:`mmptq.calibration.objective.Screen`.
        thin: Of so many rows of a sample one is for screening; all are for the comparison at the end.
    """

    steps: int
    width: int
    candidates: int
    rank: int
    thin: int


COARSE = 2
"""The stage whose best go to the final comparison, beside those of the last. Scales of later grids differ by less than a hundredth:
a quarter of the survivors, and of the candidates, is enough for them."""


def fpcs(quantizer: Quantizer, values: Tensor, screens: Sequence[Screen], exact: Sequence[Objective] | Sequence[Screen], plan: FPCS,
         present: Params | None = None) -> Params:
    """The parameters of least error.

    A grid is screened, its best are refined, and so on. In the end the best are compared exactly, and with the present
    parameters, so that a search never makes things worse.

    Args:
        quantizer: Gives the grids.
        values: What they are to cover, (groups, values).
        screens: The cheap objective; a sum, since shapes may differ between images.
        exact: The exact one.
        plan: How finely.
        present: The parameters so far, (groups,), if there are any.

    Returns:
        Parameters of shape (groups,).
    """
    grid: Grid | None = quantizer.candidates(values, plan.candidates, present)
    finalists: list[Params] = [] if present is None else [{name: value[None] for name, value in present.items()}]
    for step in range(plan.steps):
        assert grid is not None
        errors = _total(screens, quantizer, grid.params)
        part = 4 if step >= COARSE else 1
        finer = None
        if step < plan.steps - 1:
            finer = quantizer.refine(grid, errors, values, plan.candidates // part, max(1, plan.width // part))
        finalists.append(best_of(grid, errors, plan.width if step == COARSE else max(1, plan.width // 2) if finer is None else 1))
        if finer is None:
            break
        grid = finer
    params = {name: torch.cat([one[name].to(value.dtype) for one in finalists]) for name, value in finalists[-1].items()}
    return {name: value[0] for name, value in best_of(Grid(params, values[:, 0]), _total(exact, quantizer, params), 1).items()}


def _total(parts: Sequence[Screen] | Sequence[Objective], quantizer: Quantizer, params: Params) -> Tensor:
    return torch.stack([part.errors(quantizer, params) for part in parts]).sum(0)


@torch.no_grad()
def search(op: QuantOp, role: str, samples: Samples, plan: FPCS, weights: Tensor | None = None, final: bool = True) -> None:
    """Sets one operand's quantizer to the parameters of least output error, each channel or head by itself.

    The other operands pass through their quantizers as they are, float where not calibrated.

    Args:
        op: The operation.
        role: The operand.
        samples: Activations of the operation.
        plan: How finely.
        weights: What each row of the (then single) sample counts, (rows,), if not the same.
        final: Compare the best on all rows, not only on those for screening.
    """
    exact = [objective(op, role, activations, weights) for activations in samples]
    few = [part.thinned(plan.thin) for part in exact]
    _choose(op.quantizer(role), few, exact, plan, final)


@torch.no_grad()
def search_weight(op: QuantOp, gram: Gram, samples: Samples, plan: FPCS) -> None:
    """Sets the weight's quantizer to the parameters of least output error over all tokens that were summed."""
    weight = op.factors(*op.operands(*samples[0]))[1]
    exact = [gram.objective(weight[0], _channels(op, weight))]
    _choose(op.quantizer('weight'), exact, exact, plan)


@torch.no_grad()
def search_own(op: QuantOp, role: str, samples: Samples, plan: FPCS) -> None:
    """Sets one operand's quantizer to the parameters of least error of the operand itself."""
    quantizer = op.quantizer(role)
    if not quantizer.param_names:
        return
    index = op.roles.index(role)
    parts = samples[:1] if role == 'weight' else samples
    every = 1 if role == 'weight' else plan.thin
    screens = [own_error(_by_group(op, role, op.factors(*op.operands(*activations))[index])[:, :, ::every]) for activations in parts]
    params = fpcs(quantizer, torch.cat([part.values.flatten(1) for part in screens], 1), screens, screens, plan)
    quantizer.set(**{name: quantizer.ungrouped(value[None])[0] for name, value in params.items()})


def _choose(quantizer: Quantizer, few: list[Objective], exact: list[Objective], plan: FPCS, final: bool = True) -> None:
    if not quantizer.param_names:
        return
    present = quantizer.params and {name: value.reshape(-1) for name, value in quantizer.params.items()}
    values = torch.cat([part.values.flatten(1) for part in exact], 1)
    params = fpcs(quantizer, values, [screen(part, plan.rank) for part in few], exact if final else few, plan, present)
    quantizer.set(**{name: quantizer.ungrouped(value[None])[0] for name, value in params.items()})


def objective(op: QuantOp, role: str, activations: tuple[Tensor, ...], weights: Tensor | None = None) -> Objective:
    """The error of an operation's output as a function of one operand's quantizer, the others as they are.

    Args:
        op: The operation.
        role: The operand.
        activations: A sample of its activations; the target is the float output on them.
        weights: What each row of the output counts, (rows,).
    """
    index = op.roles.index(role)
    plain = op.operands(*activations)
    operands = [operand if number == index else op.quantizer(name)(operand)
                for number, (name, operand) in enumerate(zip(op.roles, plain, strict=True))]
    values = op.factors(*operands)[index]  # (batch, heads, rows, inner)
    factors, aims = (_shifted(op, op.factors(*some)) for some in (operands, plain))
    if weights is not None and index == 1:
        factors, aims = ((left * weights.sqrt()[:, None], right) for left, right in (factors, aims))
    root = factors[1 - index].transpose(-1, -2)  # (batch, heads, inner, columns)
    residual = factors[index] @ root - aims[index] @ aims[1 - index].transpose(-1, -2)
    is_gram = role == 'weight' and root.shape[-1] > root.shape[-2]
    if is_gram:  # the cheaper form
        residual, root = residual @ root.transpose(-1, -2), root @ root.transpose(-1, -2)
    if role == 'weight':
        groups = _channels(op, values)
        root = shared_by_channels(root[0], values[0], groups)
    else:
        root = _by_group(op, role, root)
    grouped = _by_group(op, role, values).contiguous()
    counts = weights.expand(grouped.shape[1], -1) if weights is not None and index == 0 else None
    return Objective(grouped, root, _by_group(op, role, residual), is_gram, counts)


def _shifted(op: QuantOp, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    offset = op.offset()
    return factors if offset is None else (factors[0] + offset, factors[1])


def _channels(op: QuantOp, weight: Tensor) -> int:
    """Sets of parameters of the weight's quantizer; ``weight`` is (1, heads, columns, inner)."""
    return 1 if op.quantizer('weight').axis is None else weight.shape[1] * weight.shape[2]


def _by_group(op: QuantOp, role: str, x: Tensor) -> Tensor:
    """A factor (batch, heads, rows, inner) as (groups, batch, rows, inner)."""
    if role == 'weight':
        return by_channel(x[0], _channels(op, x))
    if op.quantizer(role).axis is None:
        return x.reshape(1, -1, *x.shape[2:])
    return x.transpose(0, 1).contiguous()
