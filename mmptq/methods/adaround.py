"""AdaRound (Nagel et al., ICML 2020): of every weight is learned whether it is rounded
up or down.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import QuantOp, Rescale
from ..layers.standins import StandIn, in_place_of_forward
from ..quantizers import UniformQuantizer
from .adalog import op_rescale

GAMMA, ZETA = -0.1, 1.1
"""The sigmoid is stretched to this range and cut at 0 and 1, so that it reaches both
(AdaRound, equation 23).
"""

CELL = 0.45
"""How far from the value of its code a weight may be that rounds to it, in steps: half
a step would be the edge.
"""


class Rounding:
    """The learned rounding of one weight, to the grid that its quantizer has
    (AdaRound).

    It is one of the two codes next to the weight, as the operation reads it.

    Attributes:
        logits: What is learned, of the weight's shape: rounded up where not negative.
        soft: The weight with roundings in between, as :meth:`refresh` made it, with the
            graph from the logits.
        values: The same, a leaf whose gradient sums up over calls.
    """

    logits: Tensor
    soft: Tensor
    values: Tensor

    def __init__(self, op: QuantOp, quantizer: UniformQuantizer) -> None:
        assert quantizer.scale is not None and quantizer.zero_point is not None
        self.op = op
        self.quantizer = quantizer
        self.scale = quantizer.scale
        self.zero_point = quantizer.zero_point.to(self.scale.dtype)
        rescale = op_rescale(op)
        self.shift = rescale.shift if isinstance(rescale, Rescale) else None
        with torch.no_grad():
            self.read = as_read(op, op.get_parameter('weight'))
            steps = self.read * self.scale.reciprocal()
            self.below = steps.floor() + self.zero_point  # the code below
            self.logits = -torch.log(
                (ZETA - GAMMA) / (steps - steps.floor() - GAMMA) - 1
            )
        self.logits.requires_grad_()

    def up(self) -> Tensor:
        """How far each weight is rounded up, 0 to 1: the rectified sigmoid ``h(V)``
        (AdaRound, equation 23).
        """
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def codes(self, up: Tensor) -> Tensor:
        """Codes for given roundings, float: whole numbers where these are."""
        return (self.below + up).clamp(0, self.quantizer.levels - 1)

    def refresh(self) -> None:
        """Makes the weight of the next step."""
        self.soft = (self.codes(self.up()) - self.zero_point) * self.scale
        self.values = self.soft.detach().requires_grad_()

    def penalty(self, beta: float) -> Tensor:
        """How undecided the roundings are, 0 to 1 each: the sum of ``1 - |2 h(V) -
        1|^beta`` (AdaRound, equation 24).
        """
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The codes in the end, int16."""
        return self.codes((self.logits >= 0).to(self.below.dtype)).to(torch.int16)

    def made_up(self, values: Tensor, shift: Tensor) -> Tensor:
        """How much of its rounding error's product with the input's shift b a weight
        can take back inside its cells, (out,).

        The bias is corrected by ``W' b``, with the weight that is kept: that one should
        give what the float weight gives.
        """
        missing = F.linear(shift, self.read - values)
        most = CELL * self.scale.reshape(-1) * shift.abs().sum()
        return torch.minimum(torch.maximum(missing, -most), most)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """A weight with those codes as the nearest, and, as far as possible, with the
        bias's correction of the present one.
        """
        values = self.quantizer.decode(self.decided(), **(self.quantizer.params or {}))
        if self.shift is not None:
            each = self.made_up(values, self.shift) / self.shift.abs().sum().clamp(
                min=torch.finfo(values.dtype).tiny
            )
            values = values + each[:, None] * self.shift.sign()
        return as_kept(self.op, values)

    @torch.no_grad()
    def is_kept(self) -> bool:
        """Whether the operation's own weight, rounded to nearest, has those codes."""
        weight = as_read(self.op, self.op.get_parameter('weight'))
        return torch.equal(
            self.quantizer.encode(weight, **(self.quantizer.params or {})),
            self.decided(),
        )

    def stand_ins(self) -> Iterator[StandIn]:
        """What lets the operation read :attr:`values`, and correct its bias as it will
        when the weight is kept.
        """
        yield in_place_of_forward(self.quantizer, lambda weight: self.values)
        rescale, shift = op_rescale(self.op), self.shift
        if rescale is not None and shift is not None:
            yield StandIn(
                rescale,
                'correction',
                lambda weight: (
                    F.linear(shift, self.values) + self.made_up(self.values, shift)
                ),
            )


def as_read(op: QuantOp, weight: Tensor) -> Tensor:
    """A weight as the quantizer sees it."""
    rescale = op_rescale(op)
    return weight if rescale is None else rescale.weight(weight)


def as_kept(op: QuantOp, weight: Tensor) -> Tensor:
    """A weight as the operation keeps it, from what the quantizer is to see."""
    rescale = op_rescale(op)
    return (
        weight / rescale.scale
        if isinstance(rescale, Rescale) and rescale.scale is not None
        else weight
    )
