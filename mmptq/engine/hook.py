"""PTQHook: calibrates in a Runner when the checkpoint is loaded and nothing is evaluated yet."""
from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..analysis.summary import layer_rows, model_size
from ..backbones import ConversionReport, Recipe
from ..backbones.build import refuse_other
from ..backbones.convert import layers_with_products, leave_float
from ..calibration import check_weights
from ..checkpoints.about import dataset_meta, how_made
from ..checkpoints.packed import packed_model, write_packed
from ..checkpoints.reading import is_calibrated, load_checked, some
from ..checkpoints.writing import save_atomically, write_text_atomically
from ..errors import QuantizationError, printable
from ..registry import HOOKS
from ..runtime import to_integer
from ..version import __version__
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
        self.summary: dict[str, Any] = {}
        self.float_result: dict[str, Any] | None = None
        self.config: Config | None = None  # what quantized.py is to hold, if not the Runner's config
        self._images: CalibrationSet | None = None
        self._loaded: dict[str, Any] = {}
        self._converted = False
        self._started = 0.0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Checks every key, which the Runner does not."""
        model = inner_model(runner.model)
        surplus = load_verified(model, checkpoint, str(runner.cfg.get('load_from', 'the checkpoint')))
        if surplus:
            runner.logger.warning(printable(f'the checkpoint has keys that the model does not: {some(surplus, 20)}'))
        self._loaded = {'dataset_meta': dataset_meta(checkpoint), 'mmptq': how_made(checkpoint, 'the checkpoint')}

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
            if not self.summary:
                self.summary = self._summary_of(model, self._loaded['mmptq'])
        else:
            self._calibrate(runner, model)
        self._write_summary(runner)
        if self.pack and is_main_process():
            path = Path(runner.work_dir) / 'quantized.safetensors'
            write_packed(model, self.config or runner.cfg, self._about(), self._loaded.get('dataset_meta'), path)
            runner.logger.info(f'wrote {path}')
        if self.backend == 'integer':
            self._convert(runner, model)

    def before_val(self, runner: Runner) -> None:
        """Raises QuantizationError if the model is not calibrated: only a test calibrates."""
        if not is_calibrated(inner_model(runner.model)):
            raise QuantizationError('the quantized model is not calibrated, and a validation does not do that; run a test')

    def before_test_epoch(self, runner: Runner) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Writes the quantized metrics."""
        self.summary['quantized'] = {**test_result(metrics, time.perf_counter() - self._started), 'backend': self.backend}
        self._write_summary(runner)
        self.forget_progress(runner)

    def forget_progress(self, runner: Runner) -> None:
        """Removes the progress of a run that is done."""
        if is_main_process():
            (Path(runner.work_dir) / PROGRESS).unlink(missing_ok=True)

    def _calibrate(self, runner: Runner, model: Any) -> None:
        report = quantization(model)
        device = next(model.parameters()).device
        if self._images is None:
            self.prepare(runner)
        images = self._images
        assert images is not None
        peak, started = memory.Peak(device), time.perf_counter()
        progress = Path(runner.work_dir) / PROGRESS
        results = calibrate_model(model, images, self.seed, runner.logger, progress, self.resume)
        calibration = dict(dataset=type(images.dataset).__name__, split='test' if self.on_test else 'train', images=len(images.paths),
                           seed=self.seed, shuffle=self.shuffle, leak=images.leak, seconds=round(time.perf_counter() - started, 3),
                           peak_memory_mib=round(peak.mib(), 1))
        recipe = report.recipe.to_dict()
        sqnr = {name: value for result in results for name, value in result.sqnr_db.items()}
        self.summary = dict(version=__version__, method=report.recipe.method_name, recipe=recipe, bits=recipe['bits'], scope=report.scope,
                            calibration=calibration, float=self.float_result, quantized=None, size=model_size(model),
                            layers=layer_rows(model, skipped_layers(model, report), sqnr))
        if is_main_process():
            self._save(runner, model)

    def _summary_of(self, model: Any, made: Mapping[str, Any]) -> dict[str, Any]:
        """What the file says of its calibration; layers and sizes are those of the model itself."""
        skipped = skipped_layers(model, quantization(model))
        skipped |= {row['name']: row['reason'] for row in made['layers'] if row['reason'] and row['name'] in skipped}
        sqnr = {row['name']: row['sqnr_db'] for row in made['layers']}
        return {**made, 'float': self.float_result or made['float'], 'quantized': None, 'size': model_size(model),
                'layers': layer_rows(model, skipped, sqnr)}

    def _save(self, runner: Runner, model: Any) -> None:
        work_dir = Path(runner.work_dir)
        meta = {key: value for key, value in (('dataset_meta', self._loaded.get('dataset_meta')),) if value}
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        save_atomically({'meta': {**meta, 'mmptq': self._about()}, 'state_dict': state}, work_dir / 'quantized.pth')
        config = portable_config(self.config or runner.cfg, self.summary['recipe'])
        write_text_atomically(config.pretty_text, work_dir / 'quantized.py')
        runner.logger.info(f'wrote {work_dir / "quantized.pth"} and {work_dir / "quantized.py"}')

    def _convert(self, runner: Runner, model: Any) -> None:
        model.eval()
        paths = to_integer(model)
        self._converted = True
        counts = '; '.join(f'{count} as {path}' for path, count in Counter(paths.values()).most_common())
        runner.logger.info(f'the model is evaluated in integers; of its {len(paths)} quantized operations run: {counts}')
        self.summary = {**self.summary, 'layers': [{**row, 'path': paths.get(row['name'], 'float')} for row in self.summary['layers']]}

    def _about(self) -> dict[str, Any]:
        return {key: value for key, value in self.summary.items() if key != 'quantized'}

    def _write_summary(self, runner: Runner) -> None:
        if is_main_process():
            write_text_atomically(json.dumps(self.summary, indent=2) + '\n', Path(runner.work_dir) / 'summary.json')


def portable_config(cfg: Config, recipe: Mapping[str, Any]) -> Config:
    """A config with the recipe that the model has in the end, and without what belongs to one run: where it wrote, what it loaded, how it
    evaluated."""
    cfg = deepcopy(cfg)
    if 'layers' in recipe:  # calibration may have left some float
        part = cfg.model
        while 'recipe' not in part:  # test-time augmentation, or a model whose backbone is quantized
            part = part.module if 'module' in part else part.backbone
        part.recipe = recipe
        part.pop('idle', None)
    for key in ('work_dir', 'load_from'):
        cfg.pop(key, None)
    for hook in cfg.custom_hooks:
        if hook['type'] == 'mmptq.PTQHook':
            for key in ('resume', 'pack', 'backend'):
                hook.pop(key, None)
    return cfg


def test_result(metrics: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    """Metrics, as plain numbers, and seconds of an evaluation; None for NaN, which JSON does not have (a class without objects)."""
    numbers = {name: float(value) for name, value in (metrics or {}).items()}
    return dict(metrics={name: None if math.isnan(value) else value for name, value in numbers.items()}, seconds=round(seconds, 3))


def skipped_layers(model: Any, report: ConversionReport) -> dict[str, str]:
    """Every layer of a model that stays float, with the reason."""
    if report.scope == 'model':
        return report.skipped
    outside = {name: 'outside of scope backbone' for name in layers_with_products(model) if not name.startswith('backbone.')}
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
    if made:
        leave_same_float(model, report, made, source)
        refuse_other(report, made, source)
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


def leave_same_float(model: Any, report: ConversionReport, made: Mapping[str, Any], source: str) -> None:
    """Leaves those layers of a whole model float that the calibration of a file left so, where its recipe is else the model's.

    Raises:
        QuantizationError: If one is no quantized layer of the model.
    """
    own, other = report.recipe, Recipe.from_dict(made['recipe'])
    further = other.layers[len(own.layers):]
    names = [entry.pattern for entry in further if not entry.pattern.startswith('backbone.')]  # calibration leaves no other ones
    if report.scope != 'model' or not names or other != own.leaving_float(names):
        return
    try:
        leave_float(model, report, names)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None


def log_images(runner: Runner, images: CalibrationSet, wanted: int) -> None:
    """Says what the model is calibrated on."""
    name = type(images.dataset).__name__
    runner.logger.info(f'calibration: {len(images.paths)} of {len(images.dataset)} images of {name}')
    if len(images.paths) < wanted:
        runner.logger.warning(f'calibration: {wanted} images were asked for, {name} has only {len(images.paths)}')
    if images.leak:
        runner.logger.warning('leak: the model is calibrated on images that it is evaluated on; its metrics are no fair estimate')
