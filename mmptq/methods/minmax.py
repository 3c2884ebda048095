"""Min-max: every range covers all values seen. The floor that any method must beat."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration.capture import Block
from ..layers import QuantOp
from .base import require_flags, require_positive


@dataclass(frozen=True)
class MinMax:
    """Ranges from minimum to maximum, over all tokens of all calibration images.

    Args:
        rows: Rows of each operation kept to measure its error.
    """

    rescales: ClassVar[bool] = False
    rows: int = 1024
    propagate_error: bool = False

    def __post_init__(self) -> None:
        require_positive(self, 'rows')
        require_flags(self, 'propagate_error')

    @torch.no_grad()
    def calibrate(self, block: Block) -> list[Any]:
        """See :class:`mmptq.methods.Method`."""
        ranges: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

        def widen(name: str, op: QuantOp, activations: tuple[Tensor, ...]) -> None:
            for role, operand in zip(op.roles, op.operands(*activations), strict=True):
                if op.quantizer(role).dynamic or not op.quantizer(role).param_names:
                    continue
                values = op.quantizer(role).grouped(operand)
                low, high = values.amin(1), values.amax(1)
                if (name, role) in ranges:
                    low, high = torch.minimum(low, ranges[name, role][0]), torch.maximum(high, ranges[name, role][1])
                ranges[name, role] = low, high

        outputs = block.observe(self.rows, widen)
        for (name, role), (low, high) in ranges.items():
            quantizer = block.ops[name].quantizer(role)
            quantizer.set(**{key: quantizer.ungrouped(value) for key, value in quantizer.range_params(low, high).items()})
        return outputs
