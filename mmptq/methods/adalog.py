"""AdaLog (Wu et al., ECCV 2024), with a plain search: every operand's candidates are scored on a sample of tokens."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..calibration.capture import Block
from ..calibration.search import search
from .base import require_positive

# The operand searched first: the weight given the input, the base given the values.
ORDER = {'linear': ('weight', 'input'), 'conv': ('weight', 'input'), 'matmul': ('left', 'right')}


@dataclass(frozen=True)
class AdaLog:
    """Least output error, operation by operation, all inputs from the float model.

    Args:
        candidates: Parameters tried for one operand in one round, about.
        rounds: Times that each operand of an operation is searched, given the others.
        rows: Rows of each operation's activations on which candidates are scored.
    """

    candidates: int = 64
    rounds: int = 1
    rows: int = 1024
    propagate_error: bool = False

    def __post_init__(self) -> None:
        require_positive(self, 'candidates', 'rounds', 'rows')

    def calibrate(self, block: Block) -> list[Any]:
        """See :class:`mmptq.methods.Method`."""
        outputs = block.observe(self.rows)
        for name, op in block.ops.items():
            for _ in range(self.rounds):
                for role in ORDER[op.kind]:
                    search(op, role, block.samples[name], self.candidates)
        return outputs
