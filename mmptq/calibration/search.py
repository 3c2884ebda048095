"""FPCS, the fast progressive combining search (AdaLog, ECCV 2024), over any quantizer's
candidates and refinement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import QuantOp, prefer_large
from ..quantizers import Grid, Params, Quantizer
from ..quantizers.base import best_of
from .capture import Samples
from .objective import Gram, Objective, Screen, by_channel, screen, shared_by_channels


@dataclass(frozen=True)
class FPCS:
    """How finely is searched.

    Attributes:
        steps: Grids, the first included.
        width: Candidates that survive a step.
        candidates: Size of a grid.
        rank: Columns of the screen's factor, see
            :class:`mmptq.calibration.objective.Screen`.
        screen: Rows of a sample for screening, about; all are for the comparison at the
            end.
    """

    steps: int
    width: int
    candidates: int
    rank: int
    screen: int


COARSE = 2
"""The stage whose best go to the comparison at the end, beside those of the last; a
coarse search ends before it. Scales of later grids differ by less than a hundredth: an
eighth of the survivors, and of the candidates, is enough for them, and half for the
grid before.
"""

SOME = 2
"""How many times as many rows as for screening are for a first comparison of the best,
and for the weights of a coarse search.
"""

LAST = 3
"""Candidates that a first comparison leaves for the last."""

Judges = Sequence[Screen] | Sequence[Objective]
"""Objectives whose sum is asked for: one a shape, since that may differ between images.
"""


def fpcs(
    quantizer: Quantizer,
    values: Tensor,
    screens: Sequence[Screen],
    exact: Sequence[Judges],
    plan: FPCS,
    present: Params | None = None,
) -> Params:
    """The parameters of least error.

    A grid is screened, its best are refined, and so on. In the end the best are
    compared exactly, and with the present parameters, so that a search never makes
    things worse.

    Args:
        quantizer: Gives the grids.
        values: What they are to cover, (groups, values).
        screens: The cheap objective.
        exact: The exact one, perhaps on some of the rows before that on all.
        plan: How finely.
        present: The parameters so far, (groups,), if there are any.

    Returns:
        Parameters of shape (groups,).
    """
    grid: Grid | None = quantizer.candidates(values, plan.candidates, present)
    finalists: list[Params] = []
    for step in range(plan.steps):
        assert grid is not None
        errors = _total(screens, quantizer, grid.params)
        part = (1, 2, 8)[min(step, COARSE)]
        finer = None
        if step < plan.steps - 1:
            finer = quantizer.refine(
                grid,
                errors,
                values,
                plan.candidates // part,
                max(1, plan.width // part),
            )
        finalists.append(
            best_of(
                grid,
                errors,
                (
                    plan.width
                    if step == COARSE
                    else max(1, plan.width // 2)
                    if finer is None
                    else 1
                ),
            )
        )
        if finer is None:
            break
        grid = finer
    best = _joined(finalists)
    for number, judges in enumerate(exact, 1):
        last = number == len(exact)
        if last and present is not None:
            best = _joined(
                [{name: value[None] for name, value in present.items()}, best]
            )
        best = best_of(
            Grid(best, values[:, 0]),
            _total(judges, quantizer, best),
            1 if last else LAST,
        )
    return {name: value[0] for name, value in best.items()}


def _joined(grids: Sequence[Params]) -> Params:
    return {
        name: torch.cat([one[name].to(value.dtype) for one in grids])
        for name, value in grids[-1].items()
    }


def _total(parts: Judges, quantizer: Quantizer, params: Params) -> Tensor:
    return torch.stack([part.errors(quantizer, params) for part in parts]).sum(0)


@torch.no_grad()
def search(
    op: QuantOp,
    role: str,
    samples: Samples,
    plan: FPCS,
    counts: Tensor | None = None,
    final: bool = True,
) -> bool:
    """Sets one operand's quantizer to the parameters of least output error, each
    channel or head by itself.

    The other operands pass through their quantizers as they are, float where not
    calibrated.

    Args:
        op: The operation.
        role: The operand.
        samples: Activations of the operation.
        plan: How finely.
        counts: What each row of the (then single) sample counts, (rows,), if not the
            same.
        final: Compare the best on all rows; else on those for screening.

    Returns:
        Whether the parameters are others than before.
    """
    quantizer = op.quantizer(role)
    if quantizer.dynamic or not quantizer.param_names:
        return False
    index, those = (
        op.roles.index(role),
        (samples[:1] if role == 'weight' else samples),
    )  # a weight is the same in all
    tensors = [
        _by_group(op, role, op.factors(*op.operands(*activations))[index])
        for activations in those
    ]
    if role == 'weight':
        tokens = sum(len(activations[0]) for activations in samples)
        thin = [1 if final else max(1, tokens // (SOME * plan.screen))]
    else:
        rows = sum(x.shape[1:3].numel() for x in tensors)
        few, some = max(1, rows // plan.screen), max(1, rows // (SOME * plan.screen))
        thin = sorted({few, some, 1}, reverse=True) if final else [few]
    values = torch.cat([x.flatten(1) for x in tensors], 1)
    parts = [objectives(op, role, activations, counts, thin) for activations in samples]
    first, *others = [list(level) for level in zip(*parts, strict=True)]
    return _choose(quantizer, values, first, others, plan)


@torch.no_grad()
def search_weight(op: QuantOp, gram: Gram, samples: Samples, plan: FPCS) -> None:
    """Sets the weight's quantizer to the parameters of least output error over all
    tokens that were summed.
    """
    weight = op.factors(*op.operands(*samples[0]))[1]
    exact = [gram.objective(weight[0], _channels(op, weight))]
    _choose(op.quantizer('weight'), exact[0].values.flatten(1), exact, [], plan)


def _choose(
    quantizer: Quantizer,
    values: Tensor,
    first: list[Objective],
    others: list[list[Objective]],
    plan: FPCS,
) -> bool:
    if not quantizer.param_names:
        return False
    present = quantizer.params and {
        name: value.reshape(-1) for name, value in quantizer.params.items()
    }
    params = fpcs(
        quantizer,
        values,
        [screen(part, plan.rank) for part in first],
        others or [first],
        plan,
        present,
    )
    quantizer.set(
        **{name: quantizer.ungrouped(value[None])[0] for name, value in params.items()}
    )
    return present is None or any(
        not torch.equal(value, present[name].to(value.dtype))
        for name, value in params.items()
    )


def objectives(
    op: QuantOp,
    role: str,
    activations: tuple[Tensor, ...],
    counts: Tensor | None = None,
    thin: Sequence[int] = (1,),
) -> list[Objective]:
    """The error of an operation's output as a function of one operand's quantizer, the
    others as they are.

    Args:
        op: The operation.
        role: The operand.
        activations: A sample of its activations; the target is the float output on
            them.
        counts: What each row of the output counts, (rows,).
        thin: Of so many rows of the operand, or of tokens for a weight, one is taken,
            large ones by preference.

    Returns:
        One objective for each of ``thin``.
    """
    index = op.roles.index(role)
    plain = op.operands(*activations)
    rounded = op.factors(
        *(
            operand if name == role else op.quantizer(name)(operand)
            for name, operand in zip(op.roles, plain, strict=True)
        )
    )[1 - index]
    factors, offset = op.factors(*plain), op.offset()
    difference = rounded - factors[1 - index]
    if role == 'weight':
        tokens = rounded if offset is None else rounded + offset
        return [
            _of_weight(op, factors[1], tokens[0], difference[0], counts, every)
            for every in thin
        ]
    root, difference = (
        _by_group(op, role, x.transpose(-1, -2)) for x in (rounded, difference)
    )  # (groups, batch, inner, columns)
    if (
        root.shape[:2].numel() == 1 and root.shape[3] > root.shape[2]
    ):  # the outputs lie in a space of fewer dimensions
        basis, triangle = torch.linalg.qr(root.transpose(-1, -2))
        root, difference = triangle.transpose(-1, -2), difference @ basis
    values = _by_group(op, role, factors[index]).contiguous()
    row_counts = (
        counts.expand(values.shape[1], -1)
        if counts is not None and index == 0
        else None
    )
    result = []
    for every in thin:
        some, share = values, row_counts
        if 1 < every <= values.shape[2]:
            norms = torch.linalg.vector_norm(values, dim=(0, 3))  # (batch, rows)
            places, share = prefer_large(
                norms, values.shape[2] // every, 0.5, row_counts
            )
            some = values.gather(
                2,
                places[None, :, :, None].expand(
                    values.shape[0], -1, -1, values.shape[3]
                ),
            )
        result.append(
            Objective(
                some,
                root,
                (some if offset is None else some + offset) @ difference,
                counts=share,
            )
        )
    return result


def _of_weight(
    op: QuantOp,
    weight: Tensor,
    tokens: Tensor,
    error: Tensor,
    counts: Tensor | None,
    every: int,
) -> Objective:
    """The objective of a weight (1, heads, columns, inner) given rounded tokens and
    their errors, (heads, tokens, inner).
    """
    if every > 1 and tokens.shape[1] >= every:
        index, counts = prefer_large(
            torch.linalg.vector_norm(tokens, dim=(0, 2)),
            tokens.shape[1] // every,
            0.5,
            counts,
        )
        tokens, error = tokens[:, index], error[:, index]
    if counts is not None:
        tokens, error = (x * counts.sqrt()[:, None] for x in (tokens, error))
    groups = _channels(op, weight)
    if tokens.shape[1] > tokens.shape[2]:  # the cheaper form
        gram = Gram()
        gram.add(tokens, error)
        return gram.objective(weight[0], groups)
    residual = weight[0] @ error.transpose(-1, -2)
    return Objective(
        by_channel(weight[0], groups).contiguous(),
        shared_by_channels(tokens.transpose(-1, -2), weight[0], groups),
        by_channel(residual, groups),
    )


def _channels(op: QuantOp, weight: Tensor) -> int:
    """Sets of parameters of the weight's quantizer; ``weight`` is (1, heads, columns,
    inner).
    """
    return (
        1 if op.quantizer('weight').axis is None else weight.shape[1] * weight.shape[2]
    )


def _by_group(op: QuantOp, role: str, x: Tensor) -> Tensor:
    """A factor (batch, heads, rows, inner) as (groups, batch, rows, inner)."""
    if role == 'weight':
        return by_channel(x[0], _channels(op, x))
    if op.quantizer(role).axis is None:
        return x.reshape(1, -1, *x.shape[2:])
    return x.transpose(0, 1).contiguous()
