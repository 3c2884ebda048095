"""AdaLog's optional second stage: reconstruction of each block (BRECQ, Li et al., ICLR 2021; AdaRound, Nagel et al., ICML 2020).

Of every weight is learned whether it is rounded up or down, and of every activation's quantizer the scale, such that the outputs of
the block come near those of the float block. Forwards are those of the quantizers themselves, with AdaLog's rounded table; only
backwards is rounding passed over.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_flatten

from ..calibration.capture import Block
from ..layers import QuantOp, Rescale
from ..layers.standins import StandIn, in_place_of_forward, standing_in
from ..quantizers import AdaLogQuantizer, Float, Quantizer, UniformQuantizer
from .adalog import AdaLog, op_rescale
from .base import require_positive

GAMMA, ZETA = -0.1, 1.1
"""The sigmoid is stretched to this range and cut at 0 and 1, so that it reaches both (AdaRound)."""

BETA = (20.0, 2.0)
"""Exponent of the penalty at the end of the warm-up and at the end: first only what is nearly decided is pushed, in the end all."""

PENALTY = 0.01
"""What the undecided weights of a block cost, each, against the squared error of a token, the sum over its channels."""

LEAST = 0.01
"""The least that a learned scale may be, as a part of what the search found."""

CELL = 0.45
"""How far from the value of its code a weight may be that rounds to it, in steps: half a step would be the edge."""

BEYOND = 1000
"""Learning rates are less: one so large is a slip, and some more let the logits overflow."""


@dataclass(frozen=True)
class AdaLogBRECQ(AdaLog):
    """AdaLog's search, and then the reconstruction of the block.

    The weights change: each comes to lie in the cell of the code that it was learned to be rounded to, so that rounding to nearest
    does the rest. Where outputs hold no tensors (neck and heads, which end in detections) there is only the search.
    A block whose error does not become less is left as the search made it.

    Args:
        iterations: Steps of gradient descent for each block.
        batch: Calls a step, that is images.
        weight_lr: Learning rate of what decides the rounding of weights, a logit each.
        scale_lr: Learning rate of the activations' scales, at the start; it decays to 0 as a cosine.
        warmup: Part of the steps without the penalty on undecided weights.
    """

    iterations: int = 20_000
    batch: int = 32
    weight_lr: float = 1e-3
    scale_lr: float = 4e-5
    warmup: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, 'iterations', 'batch')
        for name in ('weight_lr', 'scale_lr', 'warmup'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < BEYOND:
                raise ValueError(f'{name} must be a number from 0 to less than {BEYOND}, not {value!r}')
        if self.warmup > 1:
            raise ValueError(f'warmup is a part, from 0 to 1, not {self.warmup}')

    def calibrate(self, block: Block) -> list[Any]:
        """See :class:`mmptq.methods.Method`."""
        outputs = super().calibrate(block)
        targets = [tensors(output) for output in outputs]
        if any(targets):
            improve(block, targets, self)
        return outputs


def tensors(output: Any) -> list[Tensor]:
    """The tensors of floating point in a block's output."""
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def squared_error(output: Any, targets: list[Tensor]) -> Tensor:
    """The sum over the tensors of a block's output."""
    return torch.stack([(x - y).square().sum() for x, y in zip(tensors(output), targets, strict=True)]).sum()


@torch.no_grad()
def block_error(block: Block, targets: list[list[Tensor]]) -> float:
    """The squared error of a block's outputs, over all calls, with its quantizers and weights as they are."""
    return sum(float(squared_error(block.call(call), target)) for call, target in zip(block.calls, targets, strict=True))


def improve(block: Block, targets: list[list[Tensor]], options: AdaLogBRECQ) -> None:
    """Reconstructs a block, and takes that back unless the outputs come nearer to their targets."""
    before, error = block.state(), block_error(block, targets)
    if not (reconstruct(block, targets, options) and block_error(block, targets) < error):
        block.restore_parameters()
        block.load(before)


class Rounding:
    """The learned rounding of one weight, to the grid that its quantizer has (AdaRound).

    It is one of the two codes next to the weight, as the operation reads it.

    Attributes:
        logits: What is learned, of the weight's shape: rounded up where not negative.
        soft: The weight with roundings in between, as :meth:`refresh` made it, with the graph from the logits.
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
            self.logits = -torch.log((ZETA - GAMMA) / (steps - steps.floor() - GAMMA) - 1)
        self.logits.requires_grad_()

    def up(self) -> Tensor:
        """How far each weight is rounded up, 0 to 1."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def codes(self, up: Tensor) -> Tensor:
        """Codes for given roundings, float: whole numbers where these are."""
        return (self.below + up).clamp(0, self.quantizer.levels - 1)

    def refresh(self) -> None:
        """Makes the weight of the next step."""
        self.soft = (self.codes(self.up()) - self.zero_point) * self.scale
        self.values = self.soft.detach().requires_grad_()

    def penalty(self, beta: float) -> Tensor:
        """How undecided the roundings are, the sum of 0 to 1 each."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The codes in the end, int16."""
        return self.codes((self.logits >= 0).to(self.below.dtype)).to(torch.int16)

    def made_up(self, values: Tensor, shift: Tensor) -> Tensor:
        """How much of its rounding error's product with the input's shift b a weight can take back inside its cells, (out,).

        The bias is corrected by ``W' b``, with the weight that is kept: that one should give what the float weight gives.
        """
        missing = F.linear(shift, self.read - values)
        most = CELL * self.scale.reshape(-1) * shift.abs().sum()
        return torch.minimum(torch.maximum(missing, -most), most)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """A weight with those codes as the nearest, and, as far as possible, with the bias's correction of the present one."""
        values = self.quantizer.decode(self.decided(), **(self.quantizer.params or {}))
        if self.shift is not None:
            each = self.made_up(values, self.shift) / self.shift.abs().sum().clamp(min=torch.finfo(values.dtype).tiny)
            values = values + each[:, None] * self.shift.sign()
        return as_kept(self.op, values)

    @torch.no_grad()
    def is_kept(self) -> bool:
        """Whether the operation's own weight, rounded to nearest, has those codes."""
        weight = as_read(self.op, self.op.get_parameter('weight'))
        return torch.equal(self.quantizer.encode(weight, **(self.quantizer.params or {})), self.decided())

    def stand_ins(self) -> Iterator[StandIn]:
        """What lets the operation read :attr:`values`, and correct its bias as it will when the weight is kept."""
        yield in_place_of_forward(self.quantizer, lambda weight: self.values)
        rescale, shift = op_rescale(self.op), self.shift
        if rescale is not None and shift is not None:
            yield StandIn(rescale, 'correction', lambda weight: F.linear(shift, self.values) + self.made_up(self.values, shift))


def as_read(op: QuantOp, weight: Tensor) -> Tensor:
    """A weight as the quantizer sees it."""
    rescale = op_rescale(op)
    return weight if rescale is None else rescale.weight(weight)


def as_kept(op: QuantOp, weight: Tensor) -> Tensor:
    """A weight as the operation keeps it, from what the quantizer is to see."""
    rescale = op_rescale(op)
    return weight / rescale.scale if isinstance(rescale, Rescale) and rescale.scale is not None else weight


class StraightThrough(torch.autograd.Function):
    """A quantizer whose rounding, backwards, is taken for none: ``x`` within the quantizer's range passes, beyond it is cut.

    The gradient by the scale follows from ``y = s Q(x / s)``: it is ``(y - x) / s`` within the range, ``y / s`` beyond it (LSQ,
    Esser et al., ICLR 2020).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, quantizer: Quantizer) -> Tensor:  # type: ignore[override]
        """What the quantizer does; ``scale`` is its scale."""
        y = type(quantizer).forward(quantizer, x)
        low, high = ends(quantizer, scale)
        ctx.save_for_backward(x, y, low, high, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        """The gradients by ``x`` and ``scale``."""
        x, y, low, high, scale = ctx.saved_tensors
        inside = (x >= low) & (x <= high)
        by_scale = None
        if ctx.needs_input_grad[1]:
            by_scale = (grad * (y - torch.where(inside, x, 0)) / scale).sum_to_size(scale.shape)
        return grad * inside, by_scale, None


def ends(quantizer: Quantizer, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Between what values a quantizer rounds; beyond, it cuts. Where nothing is known it rounds everywhere."""
    if isinstance(quantizer, UniformQuantizer):
        assert quantizer.zero_point is not None
        return scale * (-0.5 - quantizer.zero_point), scale * (quantizer.levels - 0.5 - quantizer.zero_point)
    if isinstance(quantizer, AdaLogQuantizer):
        return torch.zeros_like(scale), scale.detach()
    return torch.full_like(scale, -math.inf), torch.full_like(scale, math.inf)


class Activation:
    """The quantizer of an activation, whose scale is learned unless it is fixed or there is none.

    Attributes:
        scale: Its scale. That of the quantizer shares its memory, and so is always the present one.
        learned: Whether it is learned.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        found = (quantizer.params or {}).get('scale')
        self.learned = found is not None and getattr(quantizer, 'fixed_scale', None) is None
        self.scale = quantizer.place.new_ones(()) if found is None else found.detach().clone()
        self.least = LEAST * self.scale
        if self.learned:
            quantizer.scale = self.scale.detach()
            self.scale.requires_grad_()

    def stand_ins(self) -> Iterator[StandIn]:
        """What lets the operation quantize with a gradient."""
        if not isinstance(self.quantizer, Float):
            yield in_place_of_forward(self.quantizer, self.quantized)

    def quantized(self, x: Tensor, before: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """In place of the quantizer's forward."""
        return StraightThrough.apply(before(x) if before else x, self.scale, self.quantizer)  # type: ignore[no-any-return,no-untyped-call]


class Learned:
    """What is learned of a block.

    Attributes:
        roundings: Of its weights, by operation.
        activations: The quantizers of all its activations, those that only pass gradients on included.
    """

    def __init__(self, block: Block) -> None:
        self.roundings: dict[str, Rounding] = {}
        self.activations: list[Activation] = []
        for name, op in block.ops.items():
            for role, quantizer in op.quantizers().items():
                if role != 'weight':
                    self.activations.append(Activation(quantizer))
                elif isinstance(quantizer, UniformQuantizer):
                    self.roundings[name] = Rounding(op, quantizer)

    @property
    def logits(self) -> list[Tensor]:
        """Those of all roundings."""
        return [rounding.logits for rounding in self.roundings.values()]

    @property
    def scales(self) -> list[Tensor]:
        """Those that are learned."""
        return [activation.scale for activation in self.activations if activation.learned]

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the block's operations compute with what is learned, and with gradients."""
        parts: list[Rounding | Activation] = [*self.roundings.values(), *self.activations]
        return standing_in([stand_in for part in parts for stand_in in part.stand_ins()])

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Keeps learned scales from going to zero."""
        for activation in self.activations:
            if activation.learned:
                activation.scale.clamp_(min=activation.least)

    def finish(self, block: Block) -> bool:
        """Sets what was learned; whether all of it could be set."""
        if not all(bool(torch.isfinite(scale).all()) for scale in self.scales):
            return False
        for activation in self.activations:
            if activation.learned:
                activation.quantizer.set(**{**(activation.quantizer.params or {}), 'scale': activation.scale})
        for name, rounding in self.roundings.items():
            block.set_weight(name, rounding.weight())
        return all(rounding.is_kept() for rounding in self.roundings.values())


@torch.enable_grad()
def reconstruct(block: Block, targets: list[list[Tensor]], options: AdaLogBRECQ) -> bool:
    """Learns the roundings of a block's weights and the scales of its activations, and sets them.

    Args:
        block: The block, calibrated.
        targets: The outputs of the float block, one list of tensors a call.
        options: How.

    Returns:
        Whether there is anything to learn, and it came to an end with finite scales and weights that round as was learned.
    """
    learned = Learned(block)
    if not learned.logits and not learned.scales:
        return False
    optimizer = torch.optim.Adam([{'params': learned.logits, 'lr': options.weight_lr}, {'params': learned.scales, 'lr': options.scale_lr}])
    generator = torch.Generator().manual_seed(block.seed)
    with learned.in_place():
        for step in range(options.iterations):
            chosen = torch.randperm(len(block.calls), generator=generator)[:options.batch].tolist()
            optimizer.param_groups[1]['lr'] = options.scale_lr * (1 + math.cos(math.pi * step / options.iterations)) / 2
            optimizer.zero_grad()
            differentiate(block, targets, chosen, learned, beta_at(step, options))
            optimizer.step()
            learned.keep_positive()
    return learned.finish(block)


def beta_at(step: int, options: AdaLogBRECQ) -> float | None:
    """The penalty's exponent, None during the warm-up."""
    start = options.warmup * options.iterations
    return None if step < start else BETA[0] + (BETA[1] - BETA[0]) * (step - start) / (options.iterations - start)


def differentiate(block: Block, targets: list[list[Tensor]], chosen: list[int], learned: Learned, beta: float | None) -> None:
    """Puts the gradients of a step into the logits and the scales.

    The objective is the squared error over the chosen calls, divided by their number of tokens (channels are last), and the
    penalty. Calls are differentiated one by one, so that memory holds the graph of one.
    """
    roundings = list(learned.roundings.values())
    for rounding in roundings:
        rounding.refresh()
    leaves = [*(rounding.values for rounding in roundings), *learned.scales]
    tokens = sum(x.numel() // x.shape[-1] for index in chosen for x in targets[index] if x.numel())
    for index in chosen:
        error = squared_error(block.call(block.calls[index]), targets[index]) / tokens
        if error.requires_grad:
            error.backward(inputs=leaves)
    reached = [rounding for rounding in roundings if rounding.values.grad is not None]
    torch.autograd.backward([rounding.soft for rounding in reached], [rounding.values.grad for rounding in reached])
    if beta is not None:
        for rounding in roundings:
            (PENALTY * rounding.penalty(beta)).backward()
