"""PTQHook: calibrates in a Runner when the checkpoint is loaded and nothing is evaluated yet."""
from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..analysis.layers import layer_rows
from ..analysis.size import model_size
from ..analysis.summary import SCHEMA, About, BitsSummary, CalibrationSummary, Result, Summary
from ..backbones import ConversionReport
from ..backbones.convert import layers_with_products, leave_float
from ..backbones.reasons import FloatReason
from ..calibration import check_weights
from ..checkpoints.about import dataset_meta, how_made
from ..checkpoints.packed import packed_model, write_packed
from ..checkpoints.reading import is_calibrated, load_checked, some
from ..checkpoints.writing import save_atomically, write_text_atomically
from ..errors import QuantizationError, printable
from ..registry import HOOKS
from ..runtime import to_integer
from ..version import __version__
from ..wrapping.configs import portable_config
from . import memory
from .calibration import calibrate_model, inner_model, quantization, try_backbone
from .data import CalibrationSet, build_calibration_set, calibration_dataset

PROGRESS = 'calibration_progress.pth'
BACKENDS = ('simulated', 'integer')


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
        shuffle: Draw the images at random; else they are the first ones.
        resume: Go on after the last block that an interrupted run in the same work_dir calibrated.
        pack: Write ``quantized.safetensors`` too, with packed weights.
        backend: How the quantized model is evaluated: ``simulated`` or ``integer`` (:func:`mmptq.runtime.to_integer`).

    Raises:
        QuantizationError: If the backend is unknown.
    """

    priority = 'VERY_LOW'

    def __init__(self, images: int = 32, seed: int = 0, dataset: dict[str, Any] | None = None, calib_cfg: str | None = None,
                 on_test: bool = False, shuffle: bool = True, resume: bool = False, pack: bool = False,
                 backend: str = 'simulated') -> None:
        if backend not in BACKENDS:
            raise QuantizationError(f'unknown backend {backend!r}: it is one of {", ".join(BACKENDS)}')
        self.images = images
        self.seed = seed
        self.dataset = dataset
        self.calib_cfg = calib_cfg
        self.on_test = on_test
        self.shuffle = shuffle
        self.resume = resume
        self.pack = pack
        self.backend = backend
        self.summary: Summary | None = None
        self.float_result: Result | None = None
        self.config: Config | None = None  # what quantized.py is to hold, if not the Runner's config
        self._images: CalibrationSet | None = None
        self._dataset_meta: dict[str, Any] = {}
        self._about: About | None = None
        self._converted = False
        self._started = 0.0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Checks every key, which the Runner does not."""
        model = inner_model(runner.model)
        surplus = load_verified(model, checkpoint, str(runner.cfg.get('load_from', 'the checkpoint')))
        if surplus:
            runner.logger.warning(printable(f'the checkpoint has keys that the model does not: {some(surplus, 20)}'))
        self._dataset_meta, self._about = dataset_meta(checkpoint), how_made(checkpoint, 'the checkpoint')

    def prepare(self, runner: Runner) -> None:
        """Draws the calibration images, reads each once and runs the backbone on one, so that what is wrong is known before long work.

        Raises:
            QuantizationError: If the data set, or that of the evaluation, cannot be built or is empty, if an image cannot be
                read, or is evaluated without this being asked for; if an attention has other than two products; if the config cannot
                be packed and is to be.
        """
        if self.pack:
            packed_model(self.config or runner.cfg)
        try:
            evaluated = runner.test_loop.dataloader.dataset
        except Exception as error:  # what a config names may raise anything
            reason = f'{type(error).__name__}: {error}'
            raise QuantizationError(f'the test data set or metric of the config cannot be built: {reason}') from error
        dataset = self.dataset or calibration_dataset(runner.cfg, self.calib_cfg, self.on_test)
        self._images = build_calibration_set(dataset, self.images, self.seed, evaluated, self.on_test, self.shuffle)
        model = inner_model(runner.model)
        for number, batch in enumerate(self._images.batches()):
            if number == 0:
                try_backbone(model, batch)
        log_images(runner, self._images, self.images)

    def before_test(self, runner: Runner) -> None:
        """Calibrates if that is still to be done; then makes the model one of integers, if it is to be evaluated so."""
        if self._converted:
            return
        model = inner_model(runner.model)
        if is_calibrated(model):
            runner.logger.info('the checkpoint is calibrated: no calibration')
            if self.summary is None:
                assert self._about is not None  # load_verified
                self.summary = self._summary_of(model, self._about)
        else:
            self.summary = self._calibrate(runner, model)
            if is_main_process():
                self._save(runner, model, self.summary)
        write_summary(runner, self.summary)
        if self.pack and is_main_process():
            path = Path(runner.work_dir) / 'quantized.safetensors'
            write_packed(model, self.config or runner.cfg, self.summary.about(), self._dataset_meta, path)
            runner.logger.info(f'wrote {path}')
        if self.backend == 'integer':
            self.summary = self._convert(runner, model, self.summary)

    def before_val(self, runner: Runner) -> None:
        """Raises QuantizationError if the model is not calibrated: only a test calibrates."""
        if not is_calibrated(inner_model(runner.model)):
            raise QuantizationError('the quantized model is not calibrated, and a validation does not do that; run a test')

    def before_test_epoch(self, runner: Runner) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Writes the quantized metrics."""
        assert self.summary is not None  # before_test
        result = test_result(metrics, time.perf_counter() - self._started, self.backend)
        self.summary = self.summary.model_copy(update=dict(quantized=result))
        write_summary(runner, self.summary)
        self.forget_progress(runner)

    def forget_progress(self, runner: Runner) -> None:
        """Removes the progress of a run that is done."""
        if is_main_process():
            (Path(runner.work_dir) / PROGRESS).unlink(missing_ok=True)

    def _calibrate(self, runner: Runner, model: Any) -> Summary:
        report = quantization(model)
        device = next(model.parameters()).device
        if self._images is None:
            self.prepare(runner)
        images = self._images
        assert images is not None
        peak, started = memory.Peak(device), time.perf_counter()
        progress = Path(runner.work_dir) / PROGRESS
        results = calibrate_model(model, images, self.seed, runner.logger, progress, self.resume)
        calibration = CalibrationSummary(
            dataset=type(images.dataset).__name__,
            split='test' if self.on_test else 'train',
            images=len(images.paths),
            seed=self.seed,
            shuffle=self.shuffle,
            leak=images.leak,
            seconds=round(time.perf_counter() - started, 3),
            peak_memory_mib=round(peak.mib(), 1),
        )
        recipe = report.recipe.to_dict()
        sqnr = {name: value for result in results for name, value in result.sqnr_db.items()}
        return Summary(
            schema=SCHEMA,
            version=__version__,
            method=recipe['method']['type'],
            recipe=recipe,
            bits=BitsSummary(**recipe['bits']),
            scope=report.scope,  # type: ignore[arg-type]  # checked when it is made
            calibration=calibration,
            float=self.float_result,
            quantized=None,
            size=model_size(model),
            layers=layer_rows(model, skipped_layers(model, report), sqnr),
        )

    def _summary_of(self, model: Any, about: About) -> Summary:
        """What the file says of its calibration; layers and sizes are those of the model itself."""
        sqnr = {layer.name: layer.sqnr_db for layer in about.layers}
        changes = dict(
            float_result=self.float_result or about.float_result,
            size=model_size(model),
            layers=layer_rows(model, skipped_layers(model, quantization(model)), sqnr),
        )
        return Summary.of(about).model_copy(update=changes)

    def _save(self, runner: Runner, model: Any, summary: Summary) -> None:
        work_dir = Path(runner.work_dir)
        meta = {'dataset_meta': self._dataset_meta} if self._dataset_meta else {}
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        save_atomically({'meta': {**meta, 'mmptq': summary.about()}, 'state_dict': state}, work_dir / 'quantized.pth')
        config = portable_config(self.config or runner.cfg, summary.idle_layers())
        write_text_atomically(config.pretty_text, work_dir / 'quantized.py')
        runner.logger.info(f'wrote {work_dir / "quantized.pth"} and {work_dir / "quantized.py"}')

    def _convert(self, runner: Runner, model: Any, summary: Summary) -> Summary:
        model.eval()
        paths = to_integer(model)
        self._converted = True
        counts = '; '.join(f'{count} as {path}' for path, count in Counter(paths.values()).most_common())
        runner.logger.info(f'the model is evaluated in integers; of its {len(paths)} quantized operations run: {counts}')
        layers = [layer.model_copy(update=dict(path=paths.get(layer.name, 'float'))) for layer in summary.layers]
        return summary.model_copy(update=dict(layers=layers))


def write_summary(runner: Runner, summary: Summary) -> None:
    """Writes ``summary.json`` to the work_dir."""
    if is_main_process():
        write_text_atomically(json.dumps(summary.to_dict(), indent=2) + '\n', Path(runner.work_dir) / 'summary.json')


def test_result(metrics: Mapping[str, Any] | None, seconds: float, backend: str | None = None) -> Result:
    """The result of an evaluation: None for a metric that is NaN, which JSON does not have (a class without objects)."""
    numbers = {name: float(value) for name, value in (metrics or {}).items()}
    known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
    about = {} if backend is None else dict(backend=backend)
    return Result(metrics=known, seconds=round(seconds, 3), **about)


def skipped_layers(model: Any, report: ConversionReport) -> dict[str, FloatReason]:
    """Every layer of a model that stays float, with the reason."""
    if report.scope == 'model':
        return report.skipped
    outside = {name: FloatReason.OUTSIDE_OF_SCOPE for name in layers_with_products(model) if not name.startswith('backbone.')}
    return {f'backbone.{name}': reason for name, reason in report.skipped.items()} | outside


def load_verified(model: Any, checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Loads a checkpoint into a converted model, float or calibrated by the model's own recipe.

    Returns:
        Surplus keys, see :func:`load_checked`.

    Raises:
        QuantizationError: If it was calibrated by another recipe or at another scope, does not fit, or holds values that are
            not finite.
    """
    report = quantization(model)
    made = how_made(checkpoint, source)
    if made and (made.scope != report.scope or made.recipe != report.recipe.to_dict()):
        raise QuantizationError(f'{source} was quantized with recipe {made.recipe["name"]}, bits {made.bits.to_dict()}, '
                                f'scope {made.scope}, and not as asked for; use the float checkpoint, or that recipe and scope')
    try:
        leave_float(model, report, [name for name in (made.idle_layers() if made else []) if name not in report.skipped])
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    surplus = load_checked(model, checkpoint.get('state_dict', checkpoint), source)
    try:
        check_weights(model)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    if is_calibrated(model) and not made:
        raise QuantizationError(f'{source} has parameters of quantizers, but does not say by which recipe it was made')
    if made and not is_calibrated(model):
        raise QuantizationError(f'{source} says that it was quantized, but has no parameters of quantizers')
    return surplus


def log_images(runner: Runner, images: CalibrationSet, wanted: int) -> None:
    """Says what the model is calibrated on."""
    name = type(images.dataset).__name__
    runner.logger.info(f'calibration: {len(images.paths)} of {len(images.dataset)} images of {name}')
    if len(images.paths) < wanted:
        runner.logger.warning(f'calibration: {wanted} images were asked for, {name} has only {len(images.paths)}')
    if images.leak:
        runner.logger.warning('leak: the model is calibrated on images that it is evaluated on; its metrics are no fair estimate')
