"""PTQHook: calibrates in a Runner when the checkpoint is loaded and nothing is evaluated yet."""
from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from ..analysis.summary import layer_rows, model_size
from ..backbones import ConversionReport, find_spec
from ..backbones.convert import layers_with_products
from ..calibration import Block, BlockResult, Call, calibrate, calibrate_block, check_weights, operations
from ..errors import QuantizationError
from ..registry import HOOKS
from ..version import __version__
from . import memory
from .checkpoint import is_calibrated, load_checked, read_file, save_atomically, write_atomically
from .data import CalibrationSet, build_calibration_set, calibration_dataset
from .progress import BlockProgress

PROGRESS = 'calibration_progress.pth'
HEADS = 'neck and heads'


@HOOKS.register_module()
class PTQHook(Hook):
    """Calibrates a quantized model before it is tested, unless its checkpoint is calibrated already.

    Writes ``quantized.pth``, ``quantized.py`` (the config for it) and ``summary.json`` to the work_dir before the evaluation,
    and the quantized metrics into ``summary.json`` after it.

    Args:
        images: Calibration images.
        seed: Of their draw and of the token samples.
        dataset: Config of the calibration data set; by default that of the config's train_dataloader, with the test pipeline.
        calib_cfg: A config whose train_dataloader is used instead.
        on_test: Calibrate on evaluation images: a leak, said in the log and in the summary.
        resume: Go on after the last block that an interrupted run in the same work_dir calibrated.
    """

    priority = 'VERY_LOW'

    def __init__(self, images: int = 32, seed: int = 0, dataset: dict[str, Any] | None = None, calib_cfg: str | None = None,
                 on_test: bool = False, resume: bool = False) -> None:
        self.images = images
        self.seed = seed
        self.dataset = dataset
        self.calib_cfg = calib_cfg
        self.on_test = on_test
        self.resume = resume
        self.summary: dict[str, Any] = {}
        self.float_result: dict[str, Any] | None = None
        self._loaded: dict[str, Any] = {}
        self._started = 0.0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Checks every key, which the Runner does not."""
        model = inner_model(runner.model)
        surplus = load_checked(model, checkpoint.get('state_dict', checkpoint), str(runner.cfg.get('load_from', 'the checkpoint')))
        if surplus:
            runner.logger.warning(f'the checkpoint has keys that the model does not: {", ".join(surplus)}')
        meta = checkpoint.get('meta') or {}
        self._loaded = {'dataset_meta': meta.get('dataset_meta'), 'mmptq': meta.get('mmptq')}
        if is_calibrated(model):
            check_recipe(quantization(model), meta.get('mmptq'))

    def before_test(self, runner: Runner) -> None:
        """Calibrates if that is still to be done."""
        model = inner_model(runner.model)
        if is_calibrated(model):
            runner.logger.info('the checkpoint is calibrated: no calibration')
            if not self.summary:
                self.summary = {**self._loaded['mmptq'], 'float': self.float_result, 'quantized': None}
        else:
            self._calibrate(runner, model)
        self._write_summary(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        self._started = time.perf_counter()

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Writes the quantized metrics."""
        self.summary['quantized'] = test_result(metrics, time.perf_counter() - self._started)
        self._write_summary(runner)
        if is_main_process():
            (Path(runner.work_dir) / PROGRESS).unlink(missing_ok=True)

    def _calibrate(self, runner: Runner, model: nn.Module) -> None:
        report = quantization(model)
        device = next(model.parameters()).device
        dataset = self.dataset or calibration_dataset(runner.cfg, self.calib_cfg, self.on_test)
        images = build_calibration_set(dataset, self.images, self.seed, runner.test_loop.dataloader.dataset, self.on_test)
        log_images(runner, images, self.images)
        check_weights(model)
        peak, started = memory.Peak(device), time.perf_counter()
        model.eval()
        results = self._run_blocks(runner, model, report, images)
        calibration = dict(dataset=type(images.dataset).__name__, split='test' if self.on_test else 'train', images=len(images.paths),
                           seed=self.seed, leak=images.leak, seconds=round(time.perf_counter() - started, 3),
                           peak_memory_mib=round(peak.mib(), 1))
        recipe = report.recipe.to_dict()
        sqnr = {name: value for result in results for name, value in result.sqnr_db.items()}
        self.summary = dict(version=__version__, method=recipe['method']['type'], recipe=recipe, bits=recipe['bits'], scope=report.scope,
                            calibration=calibration, float=self.float_result, quantized=None, size=model_size(model),
                            layers=layer_rows(model, skipped_layers(model, report), sqnr))
        if is_main_process():
            self._save(runner, model)

    def _run_blocks(self, runner: Runner, model: nn.Module, report: ConversionReport, images: CalibrationSet) -> list[BlockResult]:
        method = report.recipe.build_method()
        path = Path(runner.work_dir) / PROGRESS
        identity = fingerprint(model, report, images, self.seed)
        done = load_progress(path, identity) if self.resume else {}
        if self.resume:
            runner.logger.info(f'resumed after {len(done)} calibrated blocks' if done else f'nothing to resume: no {PROGRESS}')
        names = find_spec(model.backbone).block_names(model.backbone)
        heads = {name: op for name, op in operations(model).items() if not name.startswith('backbone.')}
        finished: list[BlockResult] = []
        with BlockProgress(len(names) + bool(heads), runner.logger) as progress:
            def on_block(result: BlockResult) -> None:
                finished.append(result)
                progress.advance(result)
                if is_main_process():
                    save_progress(path, identity, finished)

            try:
                if heads:
                    calls = [Call((batch,)) for batch in images.batches()]
                    block = Block(HEADS, model.test_step, calls, heads, self.seed)
                    progress.start(HEADS)
                    on_block(calibrate_block(block, method, done.get(HEADS))[0])
                    del calls, block
                calibrate(model.backbone, names, backbone_calls(model, images.batches()), method, self.seed, done,
                          lambda block: (check_memory(block), progress.start(block.name))[-1], on_block)
            except (MemoryError, torch.cuda.OutOfMemoryError) as error:
                raise out_of_memory(str(error)) from None
            except RuntimeError as error:
                if "can't allocate memory" in str(error):  # torch's CPU allocator has no error of its own
                    raise out_of_memory(str(error)) from None
                raise
        return [BlockResult(result.name, result.params, {
            name if result.name == HEADS else f'backbone.{name}': value for name, value in result.sqnr_db.items()})
            for result in finished]

    def _save(self, runner: Runner, model: nn.Module) -> None:
        work_dir = Path(runner.work_dir)
        meta = {key: value for key, value in (('dataset_meta', self._loaded.get('dataset_meta')),) if value}
        about = {key: value for key, value in self.summary.items() if key not in ('float', 'quantized')}
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        save_atomically({'meta': {**meta, 'mmptq': about}, 'state_dict': state}, work_dir / 'quantized.pth')
        write_atomically(work_dir / 'quantized.py', lambda temporary: Path(temporary).write_text(runner.cfg.pretty_text))
        runner.logger.info(f'wrote {work_dir / "quantized.pth"} and {work_dir / "quantized.py"}')

    def _write_summary(self, runner: Runner) -> None:
        if is_main_process():
            write_atomically(Path(runner.work_dir) / 'summary.json',
                             lambda temporary: Path(temporary).write_text(json.dumps(self.summary, indent=2) + '\n'))


def test_result(metrics: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    """Metrics, as plain numbers, and seconds of an evaluation."""
    return dict(metrics={name: float(value) for name, value in (metrics or {}).items()}, seconds=round(seconds, 3))


def inner_model(model: nn.Module) -> nn.Module:
    """The detector or segmentor inside wrappers (distributed, test-time augmentation)."""
    while not hasattr(model, 'backbone') and hasattr(model, 'module'):
        model = model.module  # type: ignore[assignment]
    return model


def quantization(model: nn.Module) -> ConversionReport:
    """How a detector or segmentor was converted.

    Raises:
        QuantizationError: If it was not.
    """
    for module in (model, getattr(model, 'backbone', None)):
        report = getattr(module, 'quantization', None)
        if isinstance(report, ConversionReport):
            return report
    raise QuantizationError(f'{type(model).__name__} is not quantizable: PTQHook needs a model or backbone of type '
                            'mmptq.QuantModel or mmptq.QuantBackbone in the config')


def skipped_layers(model: nn.Module, report: ConversionReport) -> dict[str, str]:
    """Every layer of a model that stays float, with the reason."""
    if report.scope == 'model':
        return report.skipped
    outside = {name: 'outside of scope backbone' for name in layers_with_products(model) if not name.startswith('backbone.')}
    return {f'backbone.{name}': reason for name, reason in report.skipped.items()} | outside


def check_recipe(report: ConversionReport, meta: Mapping[str, Any] | None) -> None:
    """Raises QuantizationError if a calibrated checkpoint was made by another recipe or at another scope."""
    if not meta:
        raise QuantizationError('the checkpoint has parameters of quantizers, but does not say by which recipe it was made')
    if meta['scope'] != report.scope or meta['recipe'] != report.recipe.to_dict():
        bits = meta['bits']
        raise QuantizationError(f'the checkpoint was quantized with recipe {meta["recipe"]["name"]}, W{bits["weight"]}A{bits["activation"]}, '
                                f'scope {meta["scope"]}, and not with the one asked for; use the float checkpoint, or its own recipe')


def log_images(runner: Runner, images: CalibrationSet, wanted: int) -> None:
    """Says what the model is calibrated on."""
    name = type(images.dataset).__name__
    runner.logger.info(f'calibration: {len(images.paths)} of {len(images.dataset)} images of {name}')
    if len(images.paths) < wanted:
        runner.logger.warning(f'calibration: {wanted} images were asked for, {name} has only {len(images.paths)}')
    if images.leak:
        runner.logger.warning('leak: the model is calibrated on images that it is evaluated on; its metrics are no fair estimate')


class _Stop(Exception):  # noqa: N818  (control flow, not an error)
    """The backbone's input is known."""


@torch.no_grad()
def backbone_calls(model: nn.Module, batches: Iterable[dict[str, Any]]) -> list[Call]:
    """What the backbone gets when the model is tested on some batches (of slide inference: every window)."""
    calls: list[Call] = []
    windows = (getattr(model, 'test_cfg', None) or {}).get('mode') == 'slide'

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))
        if not windows:
            raise _Stop

    handle = model.backbone.register_forward_pre_hook(before, with_kwargs=True)  # type: ignore[union-attr, operator]
    try:
        for batch in batches:
            try:
                model.test_step(batch)  # type: ignore[operator]
            except _Stop:
                pass
    finally:
        handle.remove()
    return calls


def check_memory(block: Block) -> None:
    """Raises QuantizationError if the outputs of a block's calls would surely not fit into memory."""
    free = memory.available()
    needed = sum(call.nbytes for call in block.calls)
    if free is not None and needed > free:
        raise out_of_memory(f'block {block.name} needs {needed / memory.MIB:.0f} MiB more, {free / memory.MIB:.0f} MiB are free')


def out_of_memory(reason: str) -> QuantizationError:
    """The error for too little memory."""
    return QuantizationError(f'too little memory to calibrate: {reason.splitlines()[0]}; use fewer images (--calib-images) or a smaller '
                             'scale in the test pipeline')


def fingerprint(model: nn.Module, report: ConversionReport, images: CalibrationSet, seed: int) -> str:
    """What a run's progress depends on, as a hash: weights, recipe, scope, images, seed and version."""
    digest = hashlib.sha256(json.dumps([report.recipe.to_dict(), report.scope, images.paths, seed, __version__]).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_progress(path: Path, identity: str, results: list[BlockResult]) -> None:
    """Writes the results of the blocks calibrated so far."""
    save_atomically({'identity': identity, 'blocks': [vars(result) for result in results]}, path)


def load_progress(path: Path, identity: str) -> dict[str, BlockResult]:
    """The blocks that an interrupted run calibrated, by name; none if there was no such run.

    Raises:
        QuantizationError: If that run had other weights, images or settings.
    """
    if not path.exists():
        return {}
    content = read_file(path)
    if content.get('identity') != identity:
        raise QuantizationError(f'{path} is of a run with another checkpoint, recipe, seed or other images; remove it, or do not --resume')
    return {block['name']: BlockResult(**block) for block in content['blocks']}


