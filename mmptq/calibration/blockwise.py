"""One block after another: capture its calls, let the method choose its parameters, go
on with its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..layers import QuantOp
from .capture import Block, Call, Samples, Stream, operations
from .observing import observe
from .stage import Needs, as_stages, combined_needs, propagates

RATED = 256
"""Rows of a sample, or windows, on which the ratio of signal to noise is measured,
about.
"""


@dataclass(frozen=True)
class BlockResult:
    """What calibration made of one block.

    Attributes:
        name: The block.
        params: The parameters of its quantizers, and weights that changed, see
            :meth:`Block.state`.
        sqnr_db: By operation that ran: 10 log10 of the power of its float output over
            the power of its error, on the sample of its activations; None where one of
            the two is zero.
    """

    name: str
    params: dict[str, Tensor]
    sqnr_db: dict[str, float | None]


def calibrate(
    module: nn.Module,
    names: list[str],
    inputs: list[Call],
    stages: Any,
    seed: int = 0,
    done: Mapping[str, BlockResult] | None = None,
    on_calls: Callable[[Block], None] | None = None,
    on_block: Callable[[BlockResult], None] | None = None,
    propagate_error: bool | None = None,
) -> list[BlockResult]:
    """Calibrates the operations in the blocks of a module, in place.

    Args:
        module: A converted backbone, not calibrated.
        names: Its blocks, in forward order.
        inputs: Its calls, one an image.
        stages: What chooses the parameters, one after another: stages, or one of them
            (:mod:`mmptq.calibration.stage`).
        seed: Of the samples.
        done: Results of blocks that an interrupted run calibrated.
        on_calls: Is shown each block before it is calibrated.
        on_block: Is shown each block's result.
        propagate_error: Inputs of a block from the quantized model; else from the float
            one. None: as the first stage prefers.

    Returns:
        The results, in forward order.

    Raises:
        QuantizationError: If there are no inputs, a weight or activation is not finite,
            or two blocks share a layer, naming the layer; or in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise QuantizationError(
            'calibration does not work in torch.inference_mode(): changes in place go'
            ' unnoticed there; leave it'
        )
    if not inputs:
        raise QuantizationError('the calibration set is empty')
    check_weights(module)
    refuse_shared(module, names)
    if propagate_error is None:
        propagate_error = propagates(stages)
    stages = as_stages(stages)
    prepare(module, stages, inputs)
    results = []
    stream = Stream(module, names, inputs)
    prefix = Stream(module, names, inputs) if propagate_error else None
    for number, name in enumerate(names):
        unit = module.get_submodule(name)
        float_calls = stream.calls()
        calls = prefix.calls() if prefix else float_calls
        block = Block(
            name, unit, calls, operations(unit, f'{name}.'), seed + number, float_calls
        )
        if on_calls:
            on_calls(block)
        result, outputs = calibrate_block(block, stages, (done or {}).get(name))
        results.append(result)
        if on_block:
            on_block(result)
        stream.advance(outputs)
        if prefix:
            prefix.advance(block.run())
    return results


def prepare(module: nn.Module, stages: Any, inputs: list[Call]) -> None:
    """Lets the stages that change the whole float network do so; they need not say that
    they do not.
    """
    for stage in as_stages(stages):
        if hasattr(stage, 'prepare'):
            stage.prepare(module, getattr(module, 'quantization', None), inputs)


def run_stages(block: Block, stages: Any) -> None:
    """Observes a block once, and lets one stage after another calibrate it; one that
    does not help is taken back.
    """
    stages = as_stages(stages)
    needs = combined_needs(stages)
    if needs != Needs():
        observe(block, needs)
    for stage in stages:
        before = {name: value.clone() for name, value in block.state().items()}
        if not stage.calibrate(block):
            block.restore(before)


def calibrate_block(
    block: Block, stages: Any, done: BlockResult | None = None
) -> tuple[BlockResult, list[object]]:
    """Calibrates one block by some stages, or sets what an interrupted run found.

    Returns:
        The result, and the outputs of the float block.
    """
    if done:
        known = {name: op for name, op in block.ops.items() if name in done.sqnr_db}
        if done.sqnr_db.keys() - known.keys() or (
            not block.some_idle and known.keys() != block.ops.keys()
        ):
            raise QuantizationError(
                f'the progress of block {block.name} is of other operations; remove the'
                ' file of progress to calibrate from the start'
            )
        block.ops = known
        outputs = block.run_float()
        block.load(done.params)
        return done, outputs
    run_stages(block, stages)
    ratios = {
        name: sqnr_db(
            op,
            block.samples[name],
            block.counts.get(name),
            partial(block.as_float, [name]),
        )
        for name, op in block.ops.items()
    }
    return BlockResult(block.name, block.state(), ratios), block.targets


def check_weights(module: nn.Module) -> None:
    """Raises QuantizationError if a parameter of the module is not float32 or float64,
    or one or a buffer not finite, naming it.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() < 4:
            raise QuantizationError(
                f'{name} is in {str(parameter.dtype).removeprefix("torch.")}; calibrate'
                ' in float32 (model.float())'
            )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not bool(torch.isfinite(tensor).all()):
            raise QuantizationError(
                f'{name} holds values that are NaN or infinite; the checkpoint is'
                ' broken'
            )


def refuse_shared(module: nn.Module, names: list[str]) -> None:
    """Raises QuantizationError if an operation or its weight is in two of the blocks,
    naming both: the later one would undo the first.
    """
    owners: dict[nn.Module | Tensor, tuple[str, str]] = {}
    for block in names:
        for name, op in operations(module.get_submodule(block), f'{block}.').items():
            for part in (
                (op, op.get_parameter('weight')) if 'weight' in op.roles else (op,)
            ):
                owner, first = owners.setdefault(part, (block, name))
                if owner != block:
                    raise QuantizationError(
                        f'{first} and {name} are one layer, or share their weight, in'
                        ' two blocks; blocks are calibrated one after another, so give'
                        ' each a copy of its own'
                    )


@torch.no_grad()
def sqnr_db(
    op: QuantOp,
    samples: Samples,
    counts: Tensor | None = None,
    as_float: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float | None:
    """Signal to quantization noise ratio of an operation's output on samples of its
    activations, dB.

    ``counts`` says how many rows each row of the (then single) sample stands for,
    (rows,). Inside ``as_float`` the operation has the parameters of the float model,
    where it has others now.
    """
    signal = noise = 0.0
    for activations in samples:
        every = max(1, len(activations[0]) // RATED)
        activations = tuple(x[::every] for x in activations)
        with as_float():
            target = op.compute(*op.operands(*activations))
        each = (
            torch.ones(len(target), dtype=torch.float64, device=target.device)
            if counts is None
            else counts[::every].double()
        )
        signal += float(target.square().flatten(1).sum(1, dtype=torch.float64) @ each)
        noise += float(
            (op.quantized(*activations) - target)
            .square()
            .flatten(1)
            .sum(1, dtype=torch.float64)
            @ each
        )
    return 10 * math.log10(signal / noise) if signal and noise else None
