"""One look at a block, for all of its stages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import QuantLinear, QuantOp, Rescale
from .capture import Block
from .channels import Channels
from .stage import Needs


@torch.no_grad()
def observe(block: Block, needs: Needs) -> None:
    """Runs a block in float once and keeps what its stages need, and its outputs as
    targets.

    Raises:
        QuantizationError: As :meth:`mmptq.calibration.Block.observe` does.
    """
    channels = {}
    if needs.channels:
        for name, op in block.ops.items():
            if isinstance(op, QuantLinear) and isinstance(op.rescale, Rescale):
                channels[name] = Channels(len(block.calls), needs.channels, block.seed)
    extremes: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    order: dict[str, None] = {}

    def visit(name: str, op: QuantOp, activations: tuple[Tensor, ...]) -> None:
        order.setdefault(name)
        if name in channels:
            channels[name].add(activations[0])
        if needs.extremes:
            widen(extremes, name, op, activations)

    block.targets = block.observe(max(1, needs.rows), visit)
    block.order = list(order)
    block.channels = channels
    block.extremes = extremes


def widen(
    extremes: dict[tuple[str, str], tuple[Tensor, Tensor]],
    name: str,
    op: QuantOp,
    activations: tuple[Tensor, ...],
) -> None:
    """Widens the extremes of an operation's operands, (groups,) each, by those of one
    call.
    """
    for role, operand in zip(op.roles, op.operands(*activations), strict=True):
        quantizer = op.quantizer(role)
        if quantizer.dynamic or not quantizer.param_names:
            continue
        values = quantizer.grouped(operand)
        low, high = values.amin(1), values.amax(1)
        if (name, role) in extremes:
            lowest, highest = extremes[name, role]
            low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        extremes[name, role] = low, high
