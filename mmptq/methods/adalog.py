"""AdaLog (Wu et al., ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..calibration.capture import Block
from ..calibration.channels import Channels
from ..calibration.search import COARSE, FPCS, fpcs, search, search_weight
from ..calibration.stage import Needs
from ..layers import GeluShift, QuantLinear, QuantOp, Rescale, per_channel_rescale
from ..layers.rescale import GELU_MINIMUM
from .base import require_flags, require_positive

CHANNEL_PART = 4
"""Of so many rows one value of each channel is kept for the reparameterisation after
LayerNorm, about.
"""


@dataclass(frozen=True)
class AdaLog:
    """Least output error, operation by operation, each operand given the others.

    Candidates are scored on a sample of tokens. In the last round those of weights are
    scored over all tokens of all images, given the inputs as they are then quantized.

    Args:
        steps: Grids of a search, see :class:`mmptq.calibration.search.FPCS`.
        width: Candidates that survive a step.
        candidates: Size of a grid.
        rank: Columns of the screen's factor.
        rounds: Times that each operand of an operation is searched, given the others.
        rows: Rows of each operation's activations on which the best candidates are
            compared.
        screen: Of these rows as many are for screening all candidates, about.
        all_tokens: In the last round score weights over all tokens of all images; else
            on the sample.
        propagate_error: Inputs of a block from the quantized model; else from the float
            one. The target of an operation is its float output on these inputs: with
            that on the float model's, it would shrink what it gives to make up for the
            noise in its inputs, which the residual branch carries on all the same.
    """

    rescales: ClassVar[bool] = True
    steps: int = 6
    width: int = 16
    candidates: int = 128
    rank: int = 64
    rounds: int = 3
    rows: int = 4096
    screen: int = 256
    all_tokens: bool = True
    propagate_error: bool = False

    def __post_init__(self) -> None:
        require_positive(
            self, 'steps', 'width', 'candidates', 'rank', 'rounds', 'rows', 'screen'
        )
        require_flags(self, 'all_tokens', 'propagate_error')

    @property
    def needs(self) -> Needs:
        """A sample of activations, and values of channels for the reparameterisation
        after LayerNorm.
        """
        return Needs(rows=self.rows, channels=max(1, self.rows // CHANNEL_PART))

    def calibrate(self, block: Block) -> bool:
        """See :class:`mmptq.calibration.Stage`."""
        plan = FPCS(self.steps, self.width, self.candidates, self.rank, self.screen)
        # For what changes again.
        brief = replace(
            plan,
            steps=min(self.steps, COARSE),
            candidates=max(1, self.candidates // 2),
            rank=max(1, self.rank // 2),
        )
        for name, op in block.ops.items():
            samples = block.samples[name]
            reparameterize(op, block.channels.get(name), plan)
            changed = True
            for number in range(self.rounds):
                last = number == self.rounds - 1
                for role in op.roles:
                    if last and role == 'weight' and op.streams and self.all_tokens:
                        continue  # below
                    if number and not last and not changed:
                        # the other operand is as it was when this one was searched
                        continue
                    thorough = last or (
                        number == 0 and role != 'weight'
                    )  # the first base and scale decide where the others are looked for
                    changed = search(
                        op,
                        role,
                        samples,
                        plan if thorough else brief,
                        block.counts.get(name),
                        last,
                    )
        if self.all_tokens:
            for name, gram in block.grams().items():
                search_weight(block.ops[name], gram, block.samples[name], plan)
        return True


def op_rescale(op: QuantOp) -> Rescale | GeluShift | None:
    """How an operation's input is rescaled, if it is."""
    return op.rescale if isinstance(op, QuantLinear) else None


@torch.no_grad()
def reparameterize(op: QuantOp, channels: Channels | None, plan: FPCS) -> None:
    """Sets an operation's rescale: after a LayerNorm from the search of each channel's
    quantizer on the channel's own error.
    """
    rescale = op_rescale(op)
    if isinstance(rescale, GeluShift):
        rescale.set(shift=op.get_parameter('weight').new_tensor(GELU_MINIMUM))
    elif isinstance(rescale, Rescale) and channels is not None:
        screens = [channels.screen()]
        params = fpcs(
            op.quantizer('input'), channels.spread(), screens, [screens], plan
        )
        scale, shift = per_channel_rescale(params, channels.zero())
        rescale.set(scale=scale, shift=shift)
