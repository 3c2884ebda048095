"""Min-max: every range covers all values seen. The floor that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..calibration.capture import Block
from ..calibration.stage import Needs
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

    @property
    def needs(self) -> Needs:
        """Minima and maxima, and rows to measure the error."""
        return Needs(rows=self.rows, extremes=True)

    @torch.no_grad()
    def calibrate(self, block: Block) -> bool:
        """See :class:`mmptq.calibration.Stage`."""
        for (name, role), (low, high) in block.extremes.items():
            quantizer = block.ops[name].quantizer(role)
            quantizer.set(
                **{
                    key: quantizer.ungrouped(value)
                    for key, value in quantizer.range_params(low, high).items()
                }
            )
        return True
