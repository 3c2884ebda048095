"""UQ-ViT (AAAI 2026): NormQuant's alphas and ranges, searched block by block. DeMax is
in its quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..calibration.capture import Block, Samples
from ..calibration.ranges import least_error
from ..calibration.replay import replayed
from ..calibration.stage import Needs
from ..errors import QuantizationError
from ..layers import (
    GeluShift,
    QuantLinear,
    QuantMatMul,
    QuantOp,
    Rescale,
    largest_rescale,
    per_channel_rescale,
    prefer_large,
)
from ..layers.rescale import GELU_MINIMUM
from ..layers.standins import StandIn, in_place_of_forward, standing_in
from ..quantizers import Calibrated, Params, Quantizer, UniformQuantizer
from .base import require_flags, require_positive

FEWEST = 4
"""Calls after which candidates may leave a race."""


RANGE_PART = 8
"""Of so many rows one is for the range of the whole input, about: a row has a value of
each channel.
"""


@dataclass(frozen=True)
class Candidate:
    """What one alpha makes of a linear layer.

    Attributes:
        rescale: r and b.
        input: Parameters of the input's quantizer; empty where the input stays float.
        weight: Parameters of the weight's quantizer; empty where the weight stays
            float.
        rounded: The weight, rescaled and rounded.
    """

    rescale: Params
    input: Params
    weight: Params
    rounded: Tensor

    @classmethod
    def made(
        cls, op: QuantLinear, x: Tensor, each: Tensor, r: Tensor, b: Tensor
    ) -> Candidate:
        """The ranges of a sample of inputs (rows, in), whose values count ``each``, and
        of the weight after a rescale.
        """
        quantizer, weight = op.quantizer('weight'), op.weight * r
        inputs: Params = {}
        if op.quantizer('input').param_names:
            found = least_error(op.quantizer('input'), (x / r - b).reshape(1, -1), each)
            inputs = {name: value[0] for name, value in found.items()}
        params = weight_params(quantizer, weight)
        return cls(
            dict(scale=r, shift=b),
            inputs,
            params,
            (
                quantizer.fake_quantize(weight, before=None, **params)
                if params
                else weight
            ),
        )

    def parts(self, op: QuantLinear) -> list[tuple[Calibrated, Params]]:
        """The layer's parts, and what their parameters would be."""
        assert isinstance(op.rescale, Rescale)
        return [
            (op.rescale, self.rescale),
            (op.quantizer('input'), self.input),
            (op.quantizer('weight'), self.weight),
        ]

    def settle(self, op: QuantLinear) -> None:
        """Sets the parameters."""
        for part, params in self.parts(op):
            part.set(**params)

    @contextmanager
    def tried(self, op: QuantLinear) -> Iterator[None]:
        """Inside, the layer is like this; the weight is not rounded again. The
        parameters are not checked: :meth:`settle` does that.
        """
        parameters = [
            StandIn(part, name, value)
            for part, params in self.parts(op)
            for name, value in params.items()
        ]
        rounded = in_place_of_forward(
            op.quantizer('weight'), lambda weight: self.rounded
        )
        with standing_in([*parameters, rounded]):
            yield


@dataclass(frozen=True)
class UQViT:
    """Ranges of least squared error among percentiles; alphas of least squared error of
    the block's output, greedily.

    Linear layers are visited in the order in which they run, each with the products of
    attention that follow it: qkv with both (the probabilities in float meanwhile),
    proj, fc1, fc2. What comes before is quantized, what comes after is float. Inputs
    are those of the quantized model, targets the outputs of the float one. Ranges and
    the scales of channels are from a sample of an operation's activations in the float
    block on these inputs.

    Args:
        alphas: For inputs after a LayerNorm (NormQuant with shift).
        plain_alphas: For other inputs with a rescale (NormQuant without shift); None
            stands for no rescale.
        images: So many of the calibration images, evenly spread, compare alphas; None:
            all.
        rows: Rows of each operation's activations in the sample.
        propagate_error: Inputs of a block from the quantized model; else from the float
            one.
    """

    rescales: ClassVar[bool] = True
    alphas: Sequence[float] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
    plain_alphas: Sequence[float | None] = (
        None,
        0.0,
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        1.0,
    )
    images: int | None = None
    rows: int = 4096
    propagate_error: bool = True

    def __post_init__(self) -> None:
        require_positive(self, 'rows', *(['images'] if self.images is not None else []))
        require_flags(self, 'propagate_error')
        for name, values, none in (
            ('alphas', self.alphas, False),
            ('plain_alphas', self.plain_alphas, True),
        ):
            if not (
                isinstance(values, list | tuple)
                and values
                and all(
                    _is_alpha(value) or (none and value is None) for value in values
                )
            ):
                raise ValueError(
                    f'{name} must be a list of numbers from 0 to 1{" or None" * none},'
                    f' at least one, not {values!r}'
                )

    @property
    def needs(self) -> Needs:
        """A sample of activations."""
        return Needs(rows=self.rows)

    @torch.no_grad()
    def calibrate(self, block: Block) -> bool:
        """See :class:`mmptq.calibration.Stage`.

        Raises:
            QuantizationError: If an input is to be rescaled, and the block's output has
                no tensors by which to compare alphas.
        """
        order, outputs = {name: block.ops[name] for name in block.order}, block.targets
        rescaled = [
            name
            for name, op in order.items()
            if isinstance(op, QuantLinear) and isinstance(op.rescale, Rescale)
        ]
        if rescaled and not _tensors(outputs):
            raise QuantizationError(
                f'{rescaled[0]}: alphas are compared by the output of the block,'
                f' {block.name} give no tensors; drop the option rescale of the'
                f' quantizer of site {order[rescaled[0]].sites["input"]}'
            )
        for name, op in order.items():
            if not isinstance(op, QuantLinear) or not isinstance(op.rescale, Rescale):
                set_ranges(op, block.samples[name], block.counts.get(name))
        floats = dict(order)  # what is not reached yet
        for name, op in order.items():
            if name not in floats:
                continue  # went with the layer before it
            del floats[name]
            products = [
                floats.pop(other)
                for other in list(
                    takewhile(
                        lambda other: isinstance(order[other], QuantMatMul), floats
                    )
                )
            ]
            if isinstance(op, QuantLinear) and isinstance(op.rescale, Rescale):
                candidates = self._candidates(
                    op, block.samples[name][0][0], block.counts[name]
                )
                probabilities = [
                    product.quantizer('left')
                    for product in products
                    if product.sites['left'] == 'post_softmax'
                ]
                with (
                    block.as_float(floats),
                    standing_in(
                        [
                            in_place_of_forward(quantizer, as_it_is)
                            for quantizer in probabilities
                        ]
                    ),
                ):
                    errors = output_errors(block, op, candidates, outputs, self.images)
                candidates[int(errors.argmin())].settle(op)
        return True

    def _candidates(
        self, op: QuantLinear, x: Tensor, counts: Tensor
    ) -> list[Candidate]:
        """What each alpha makes of a layer, given a sample of its inputs (rows, in) and
        what each row counts, (rows,).
        """
        quantizer, columns = op.quantizer('input'), column_scales(op)
        channels = least_error(quantizer, x.t(), counts)  # each channel by itself
        if op.sites['input'] == 'post_norm':
            zero = (x == 0).all(0)
            changes = [
                per_channel_rescale(channels, zero, alpha, columns)
                for alpha in self.alphas
            ]
        else:
            largest = largest_magnitudes(quantizer, channels, x)
            plain = torch.ones_like(largest), torch.zeros_like(largest)
            changes = [
                (
                    plain
                    if alpha is None
                    else (largest_rescale(largest, alpha, columns), plain[1])
                )
                for alpha in self.plain_alphas
            ]
        places, counts = prefer_large(
            torch.linalg.vector_norm(x, dim=1),
            max(1, self.rows // RANGE_PART),
            0.5,
            counts,
        )
        each = counts.repeat_interleave(x.shape[1])
        return [Candidate.made(op, x[places], each, r, b) for r, b in changes]


def output_errors(
    block: Block,
    op: QuantLinear,
    candidates: Sequence[Candidate],
    targets: Sequence[Any],
    images: int | None,
    sure: float = 1.5,
) -> Tensor:
    """The squared error of the block's output with each candidate, (candidates,),
    float64; infinite for one that left the race.

    Call after call all candidates that are still in the race are compared; one whose
    errors are surely larger than the best one's leaves it (Hoeffding races, Maron and
    Moore, 1993; here by the standard error of the difference).

    Args:
        block: The block, its other operations as they are to be.
        op: The layer.
        candidates: To compare.
        targets: The block's outputs in the float model.
        images: Calls to compare on, evenly spread; None: all.
        sure: By so many standard errors; infinity: all stay in the race.
    """
    count = min(images or len(block.calls), len(block.calls))
    errors = torch.zeros(
        len(candidates), count, dtype=torch.float64, device=op.weight.device
    )
    running = list(range(len(candidates)))
    for number in range(count):
        if len(running) == 1:
            break
        place = number * len(block.calls) // count
        call, target = block.calls[place], _tensors(targets[place])
        with replayed(block.module, op) as replay:
            for index in running:
                with candidates[index].tried(op):
                    output = _tensors(replay.run(*call.args, **call.kwargs))
                errors[index, number] = sum(
                    (a - b).square().sum(dtype=torch.float64)
                    for a, b in zip(output, target, strict=True)
                )
        running = [
            running[place] for place in in_the_race(errors[running, : number + 1], sure)
        ]
    total = torch.full_like(errors[:, 0], torch.inf)
    total[running] = errors[running].sum(1)
    return total


def in_the_race(errors: Tensor, sure: float) -> list[int]:
    """Places of the candidates whose mean error is not larger than the best one's by
    ``sure`` standard errors of the difference.

    Args:
        errors: Of each candidate on each call so far, (candidates, calls).
        sure: See :func:`output_errors`.
    """
    candidates, calls = errors.shape
    if calls < FEWEST:
        return list(range(candidates))
    difference = errors - errors[errors.sum(1).argmin()]
    surely_larger = difference.mean(1) > sure * difference.std(1) / calls**0.5
    return (~surely_larger).nonzero()[:, 0].tolist()


def set_ranges(op: QuantOp, samples: Samples, counts: Tensor | None) -> None:
    """Sets the quantizers of an operation, but for dynamic ones, to the percentile
    range of least squared error of the operand.
    """
    if isinstance(op, QuantLinear) and isinstance(op.rescale, GeluShift):
        op.rescale.set(shift=op.weight.new_tensor(GELU_MINIMUM))
    for index, (role, quantizer) in enumerate(op.quantizers().items()):
        if quantizer.dynamic or not quantizer.param_names:
            continue
        if role == 'weight':
            quantizer.set(**weight_params(quantizer, op.operands(*samples[0])[index]))
            continue
        values = torch.cat(
            [quantizer.grouped(op.operands(*sample)[index]) for sample in samples], 1
        )
        each = (
            None
            if counts is None
            else counts.repeat_interleave(values.shape[1] // len(counts))
        )
        found = least_error(quantizer, values, each)
        quantizer.set(
            **{
                name: quantizer.ungrouped(value[None])[0]
                for name, value in found.items()
            }
        )


def weight_params(quantizer: Quantizer, weight: Tensor) -> Params:
    """The range of least squared error of a weight, in the shape of its quantizer's
    parameters; empty where it stays float.
    """
    if not quantizer.param_names:
        return {}
    found = least_error(quantizer, quantizer.grouped(weight))
    return {name: quantizer.ungrouped(value[None])[0] for name, value in found.items()}


def column_scales(op: QuantLinear) -> Tensor:
    """Scales of the weight's columns, (in,), up to a factor: symmetric ranges of least
    squared error, at the weight's bits.
    """
    columns = op.weight.t()
    scales = least_error(
        UniformQuantizer(min(8, op.quantizer('weight').bits)),
        torch.cat([columns, -columns], 1),
    )['scale']
    return scales.masked_fill((columns == 0).all(1), 0)


def largest_magnitudes(quantizer: Quantizer, channels: Params, x: Tensor) -> Tensor:
    """``c``, the largest magnitude in each channel of the input (rows, in) quantized by
    channels; at 6 bits as it is (UQ-ViT's).
    """
    if quantizer.param_names and quantizer.bits != 6:
        x = quantizer.fake_quantize(x, before=None, **channels)
    return x.abs().amax(0)


def as_it_is(x: Tensor) -> Tensor:
    """The forward of a quantizer that is to leave its input alone."""
    return x


def _tensors(output: Any) -> list[Tensor]:
    return [
        x
        for x in tree_flatten(output)[0]
        if isinstance(x, Tensor) and x.is_floating_point()
    ]


def _is_alpha(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= 1
    )
