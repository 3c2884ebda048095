"""BRECQ (Li et al., ICLR 2021): reconstruction of each block, with AdaRound's weights
and LSQ's scales.

Of every weight is learned whether it is rounded up or down, and of every activation's
quantizer the scale, such that the outputs of the block come near those of the float
block. Forwards are those of the quantizers themselves, with AdaLog's rounded table;
only backwards is rounding passed over.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..calibration.capture import Block
from ..calibration.stage import Needs
from ..layers.standins import standing_in
from ..quantizers import UniformQuantizer
from .adaround import Rounding
from .base import require_positive
from .lsq import Activation

BETA = (20.0, 2.0)
"""Exponent of the penalty at the end of the warm-up and at the end: first only what is
nearly decided is pushed, in the end all.
"""

PENALTY = 0.01
"""What the undecided weights of a block cost, each, against the squared error of a
token, the sum over its channels.
"""

BEYOND = 1000
"""Learning rates are less: one so large is a slip, and some more let the logits
overflow.
"""


@dataclass(frozen=True)
class BRECQ:
    """The reconstruction of a block that a stage before it calibrated, such as AdaLog
    or UQ-ViT.

    The weights change: each comes to lie in the cell of the code that it was learned to
    be rounded to, so that rounding to nearest does the rest. Where outputs hold no
    tensors (neck and heads, which end in detections) nothing is done. A block whose
    error does not become less is left as it was.

    Args:
        iterations: Steps of gradient descent for each block.
        batch: Calls a step, that is images.
        weight_lr: Learning rate of what decides the rounding of weights, a logit each.
        scale_lr: Learning rate of the activations' scales, at the start; it decays to 0
            as a cosine.
        warmup: Part of the steps without the penalty on undecided weights.
    """

    rescales: ClassVar[bool] = False
    improves: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(rows=1)
    iterations: int = 20_000
    batch: int = 32
    weight_lr: float = 1e-3
    scale_lr: float = 4e-5
    warmup: float = 0.2

    def __post_init__(self) -> None:
        require_positive(self, 'iterations', 'batch')
        for name in ('weight_lr', 'scale_lr', 'warmup'):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value < BEYOND
            ):
                raise ValueError(
                    f'{name} must be a number from 0 to less than {BEYOND}, not'
                    f' {value!r}'
                )
        if self.warmup > 1:
            raise ValueError(f'warmup is a part, from 0 to 1, not {self.warmup}')

    def calibrate(self, block: Block) -> bool:
        """Reconstructs a block; returns whether its outputs come nearer to their
        targets.

        The objective is the squared error of the block's output, with the same weight
        for all of its values (BRECQ, equation 10, without the Fisher information).
        """
        targets = [tensors(output) for output in block.targets]
        if not any(targets):
            return False
        error = block_error(block, targets)
        return reconstruct(block, targets, self) and block_error(block, targets) < error


def tensors(output: Any) -> list[Tensor]:
    """The tensors of floating point in a block's output."""
    return [
        x
        for x in tree_flatten(output)[0]
        if isinstance(x, Tensor) and x.is_floating_point()
    ]


def squared_error(output: Any, targets: list[Tensor]) -> Tensor:
    """The sum over the tensors of a block's output."""
    return torch.stack(
        [(x - y).square().sum() for x, y in zip(tensors(output), targets, strict=True)]
    ).sum()


@torch.no_grad()
def block_error(block: Block, targets: list[list[Tensor]]) -> float:
    """The squared error of a block's outputs, over all calls, with its quantizers and
    weights as they are.
    """
    return sum(
        float(squared_error(block.call(call), target))
        for call, target in zip(block.calls, targets, strict=True)
    )


class Learned:
    """What is learned of a block.

    Attributes:
        roundings: Of its weights, by operation.
        activations: The quantizers of all its activations, those that only pass
            gradients on included.
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
        return [
            activation.scale for activation in self.activations if activation.learned
        ]

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the block's operations compute with what is learned, and with
        gradients.
        """
        parts: list[Rounding | Activation] = [
            *self.roundings.values(),
            *self.activations,
        ]
        return standing_in(
            [stand_in for part in parts for stand_in in part.stand_ins()]
        )

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
                activation.quantizer.set(
                    **{**(activation.quantizer.params or {}), 'scale': activation.scale}
                )
        for name, rounding in self.roundings.items():
            block.set_weight(name, rounding.weight())
        return all(rounding.is_kept() for rounding in self.roundings.values())


@torch.enable_grad()
def reconstruct(block: Block, targets: list[list[Tensor]], options: BRECQ) -> bool:
    """Learns the roundings of a block's weights and the scales of its activations, and
    sets them.

    Args:
        block: The block, calibrated.
        targets: The outputs of the float block, one list of tensors a call.
        options: How.

    Returns:
        Whether there is anything to learn, and it came to an end with finite scales and
        weights that round as was learned.
    """
    learned = Learned(block)
    if not learned.logits and not learned.scales:
        return False
    optimizer = torch.optim.Adam(
        [
            {'params': learned.logits, 'lr': options.weight_lr},
            {'params': learned.scales, 'lr': options.scale_lr},
        ]
    )
    generator = torch.Generator().manual_seed(block.seed)
    with learned.in_place():
        for step in range(options.iterations):
            chosen = torch.randperm(len(block.calls), generator=generator)[
                : options.batch
            ].tolist()
            optimizer.param_groups[1]['lr'] = (
                options.scale_lr
                * (1 + math.cos(math.pi * step / options.iterations))
                / 2
            )
            optimizer.zero_grad()
            differentiate(block, targets, chosen, learned, beta_at(step, options))
            optimizer.step()
            learned.keep_positive()
    return learned.finish(block)


def beta_at(step: int, options: BRECQ) -> float | None:
    """The penalty's exponent, None during the warm-up."""
    start = options.warmup * options.iterations
    return (
        None
        if step < start
        else BETA[0]
        + (BETA[1] - BETA[0]) * (step - start) / (options.iterations - start)
    )


def differentiate(
    block: Block,
    targets: list[list[Tensor]],
    chosen: list[int],
    learned: Learned,
    beta: float | None,
) -> None:
    """Puts the gradients of a step into the logits and the scales.

    The objective is the squared error over the chosen calls, divided by their number of
    tokens (channels are last), and the penalty. Calls are differentiated one by one, so
    that memory holds the graph of one.
    """
    roundings = list(learned.roundings.values())
    for rounding in roundings:
        rounding.refresh()
    leaves = [*(rounding.values for rounding in roundings), *learned.scales]
    tokens = sum(
        x.numel() // x.shape[-1]
        for index in chosen
        for x in targets[index]
        if x.numel()
    )
    for index in chosen:
        error = squared_error(block.call(block.calls[index]), targets[index]) / tokens
        if error.requires_grad:
            error.backward(inputs=leaves)
    reached = [rounding for rounding in roundings if rounding.values.grad is not None]
    torch.autograd.backward(
        [rounding.soft for rounding in reached],
        [rounding.values.grad for rounding in reached],
    )
    if beta is not None:
        for rounding in roundings:
            (PENALTY * rounding.penalty(beta)).backward()
