"""The calibration of a whole detector or segmentor on a set of images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from torch import nn

from ..backbones import ConversionReport, find_spec
from ..backbones.convert import leave_float
from ..calibration import (
    Block,
    BlockResult,
    Call,
    calibrate,
    calibrate_block,
    operations,
)
from ..checkpoints.progress import fingerprint, load_progress, save_progress
from ..checkpoints.reading import some
from ..errors import QuantizationError
from . import memory
from .data import CalibrationSet
from .progress import BlockProgress

HEADS = 'neck and heads'
"""Name of the unit that all operations outside the backbone form."""


def calibrate_model(
    model: Any,
    images: CalibrationSet,
    seed: int,
    logger: logging.Logger,
    progress_path: Path,
    resume: bool = False,
) -> list[BlockResult]:
    """Calibrates a converted detector or segmentor, in place.

    Neck and heads, if they are quantized, come first, while the backbone is still
    float, and get what they get in a test: feature maps of all levels, real proposals.
    Those of their layers that get nothing stay float.

    Args:
        model: With a converted backbone, not calibrated.
        images: What it is calibrated on.
        seed: Of the token samples.
        logger: Told of each block.
        progress_path: File for the blocks calibrated so far.
        resume: Take up the blocks in that file.

    Returns:
        Results with names of operations in the model.

    Raises:
        QuantizationError: If weights or activations are not finite, an image cannot be
            read, memory is too small, or the progress is of another run.
    """
    report = quantization(model)
    method = report.recipe.build_method()
    model.eval()
    identity = fingerprint(model, report, images.paths, seed)
    done = load_progress(progress_path, identity) if resume else {}
    if resume:
        logger.info(
            f'resumed after {len(done)} calibrated blocks'
            if done
            else f'nothing to resume: there is no {progress_path.name}'
        )
    names = find_spec(model.backbone).block_names(model.backbone)
    heads = {
        name: op
        for name, op in operations(model).items()
        if not name.startswith('backbone.')
    }
    finished: list[BlockResult] = []
    with BlockProgress(len(names) + bool(heads), logger) as progress:

        def on_calls(block: Block) -> None:
            check_memory(block)
            progress.start(block.name)

        def on_block(result: BlockResult) -> None:
            finished.append(result)
            progress.advance(result)
            if is_main_process():
                save_progress(progress_path, identity, finished)

        try:
            if heads:
                block = Block(
                    HEADS,
                    model.test_step,
                    [Call((batch,)) for batch in images.batches()],
                    heads,
                    seed,
                    some_idle=True,
                )
                on_calls(block)
                on_block(calibrate_block(block, method, done.get(HEADS))[0])
                idle = [name for name in heads if name not in block.ops]
                if idle:
                    logger.warning(
                        f'{some(idle)} received nothing in {len(images.paths)}'
                        ' calibration images and will stay float; more or other images'
                        ' (--calib-images, --calib-cfg) may change that'
                    )
                leave_float(model, report, idle)
                del block
            calibrate(
                model.backbone,
                names,
                backbone_calls(model, images.batches()),
                method,
                seed,
                done,
                on_calls,
                on_block,
                report.recipe.propagate_error,
            )
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            raise out_of_memory(str(error)) from None
        except RuntimeError as error:
            if "can't allocate memory" in str(
                error
            ):  # torch's CPU allocator has no error of its own
                raise out_of_memory(str(error)) from None
            raise
    return [
        BlockResult(
            result.name,
            result.params,
            {
                name if result.name == HEADS else f'backbone.{name}': value
                for name, value in result.sqnr_db.items()
            },
        )
        for result in finished
    ]


def inner_model(model: Any) -> Any:
    """The detector or segmentor inside wrappers (distributed, test-time augmentation)."""
    while not hasattr(model, 'backbone') and hasattr(model, 'module'):
        model = model.module
    return model


def quantization(model: Any) -> ConversionReport:
    """How a detector or segmentor was converted.

    Raises:
        QuantizationError: If it was not.
    """
    for module in (model, getattr(model, 'backbone', None)):
        report = getattr(module, 'quantization', None)
        if isinstance(report, ConversionReport):
            return report
    raise QuantizationError(
        f'{type(model).__name__} is not quantizable: PTQHook needs a model or backbone'
        ' of type mmptq.QuantModel or mmptq.QuantBackbone in the config'
    )


class _Stop(Exception):  # noqa: N818  (control flow, not an error)
    """The backbone's input is known."""


@torch.no_grad()
def backbone_calls(model: Any, batches: Iterable[dict[str, Any]]) -> list[Call]:
    """What the backbone gets when the model is tested on some batches (of slide
    inference: every window).
    """
    calls: list[Call] = []
    windows = (getattr(model, 'test_cfg', None) or {}).get('mode') == 'slide'

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))
        if not windows:
            raise _Stop

    handle = model.backbone.register_forward_pre_hook(before, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model.test_step(batch)
            except _Stop:
                pass
    finally:
        handle.remove()
    return calls


@torch.no_grad()
def try_backbone(model: Any, batch: dict[str, Any]) -> None:
    """Runs the backbone on a batch; raises QuantizationError if an attention in it is
    not what its BackboneSpec says.
    """
    model.eval()
    call = backbone_calls(model, [batch])[0]
    model.backbone(*call.args, **call.kwargs)


def check_memory(block: Block) -> None:
    """Raises QuantizationError if the outputs of a block's calls would surely not fit
    into memory.
    """
    free = memory.available()
    needed = sum(call.nbytes for call in block.calls)
    if free is not None and needed > free:
        raise out_of_memory(
            f'block {block.name} needs {needed / memory.MIB:.0f} MiB more,'
            f' {free / memory.MIB:.0f} MiB are free'
        )


def out_of_memory(reason: str) -> QuantizationError:
    """The error for too little memory."""
    return QuantizationError(
        f'too little memory to calibrate: {reason.splitlines()[0]}; use fewer images'
        ' (--calib-images) or a smaller scale in the test pipeline'
    )
