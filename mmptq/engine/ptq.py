"""The work on one model: its checkpoint, its calibration, its files, its summary."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process

from ..analysis.layers import layer_rows
from ..analysis.size import model_size
from ..analysis.summary import (
    SCHEMA,
    About,
    BitsSummary,
    CalibrationSummary,
    Result,
    Summary,
)
from ..backbones import ConversionReport
from ..backbones.convert import layers_with_products
from ..backbones.reasons import FloatReason
from ..checkpoints.about import dataset_meta, how_made
from ..checkpoints.packed import packed_model, write_packed
from ..checkpoints.reading import is_calibrated, some
from ..checkpoints.writing import save_atomically, write_text_atomically
from ..errors import QuantizationError, printable
from ..runtime import to_integer
from ..version import __version__
from ..wrapping.configs import portable_config
from . import memory
from .calibration import calibrate_model, quantization, try_backbone
from .data import CalibrationSet, build_calibration_set, calibration_dataset
from .evaluation import test_result
from .loading import load_verified
from .options import Options

PROGRESS = 'calibration_progress.pth'


class PTQ:
    """The quantization of one detector or segmentor, step by step; who calls it decides
    when.

    Args:
        options: What the user wants.
        cfg: The quantizable config, which ``quantized.py`` is made of.
        work_dir: Where files go.
        logger: Told what is done.
        source: The name of the checkpoint, for messages.
    """

    def __init__(
        self,
        options: Options,
        cfg: Config,
        work_dir: Path,
        logger: logging.Logger,
        source: str = 'the checkpoint',
    ) -> None:
        self.options = options
        self.cfg = cfg
        self.work_dir = work_dir
        self.logger = logger
        self.source = source
        self.summary: Summary | None = None
        self.float_result: Result | None = None
        self._about: About | None = None
        self._dataset_meta: dict[str, Any] = {}
        self._images: CalibrationSet | None = None
        self._converted = False

    def load(self, model: Any, checkpoint: Mapping[str, Any]) -> None:
        """Loads a checkpoint; every key is checked, which a Runner does not do.

        Raises:
            QuantizationError: If it is of another model or recipe, see
                :func:`load_verified`.
        """
        surplus = load_verified(model, checkpoint, self.source)
        if surplus:
            self.logger.warning(
                printable(
                    'the checkpoint has keys that the model does not:'
                    f' {some(surplus, 20)}'
                )
            )
        self._dataset_meta = dataset_meta(checkpoint)
        self._about = how_made(checkpoint, self.source)

    def prepare(self, model: Any, test_set: Callable[[], Any]) -> CalibrationSet:
        """Draws the calibration images, reads each once and runs the backbone on one.

        So what is wrong is known before long work.

        Args:
            model: The converted model.
            test_set: Builds the data set of the evaluation.

        Raises:
            QuantizationError: If a data set cannot be built or is empty, if an image
                cannot be read, or is evaluated without this being asked for; if an
                attention has other than two products; if the config cannot be packed
                and is to be.
        """
        options = self.options
        if options.pack:
            packed_model(self.cfg)
        try:
            evaluated = test_set()
        except Exception as error:  # what a config names may raise anything
            raise QuantizationError(
                'the test data set or metric of the config cannot be built: '
                f'{type(error).__name__}: {error}'
            ) from error

        dataset = options.dataset
        if dataset is None:
            dataset = calibration_dataset(
                self.cfg, options.calib_config, options.on_test
            )
        images = build_calibration_set(
            dataset,
            options.images,
            options.seed,
            evaluated,
            options.on_test,
            options.shuffled,
        )
        for number, batch in enumerate(images.batches()):
            if number == 0:
                try_backbone(model, batch)
        log_images(self.logger, images, options.images)
        self._images = images
        return images

    def run(self, model: Any, test_set: Callable[[], Any]) -> None:
        """Calibrates and writes files if that is still to be done; then makes the model
        one of integers, if it is to be evaluated so.

        Args:
            model: The converted model, its checkpoint loaded.
            test_set: Builds the data set of the evaluation.
        """
        if self._converted:
            return
        if is_calibrated(model):
            self.logger.info('the checkpoint is calibrated: no calibration')
            summary = self.summary or self._summary_of_file(model)
        else:
            summary = self._calibrate(
                model, self._images or self.prepare(model, test_set)
            )
            self._write_model(model, summary)
        self._say(summary)
        self._write_packed(model, summary)
        if self.options.backend == 'integer':
            self.summary = self._convert(model, summary)

    def evaluated(self, metrics: Mapping[str, Any] | None, seconds: float) -> None:
        """Adds the metrics of the quantized model to the summary."""
        assert self.summary is not None  # run came before
        result = test_result(metrics, seconds, self.options.backend)
        self._say(self.summary.model_copy(update=dict(quantized=result)))
        self.forget_progress()

    def forget_progress(self) -> None:
        """Removes the progress of a run that is done."""
        if is_main_process():
            (self.work_dir / PROGRESS).unlink(missing_ok=True)

    def _calibrate(self, model: Any, images: CalibrationSet) -> Summary:
        options, progress = self.options, self.work_dir / PROGRESS
        peak, started = (
            memory.Peak(next(model.parameters()).device),
            time.perf_counter(),
        )
        results = calibrate_model(
            model, images, options.seed, self.logger, progress, options.resume
        )
        calibration = CalibrationSummary(
            dataset=type(images.dataset).__name__,
            split='test' if options.on_test else 'train',
            images=len(images.paths),
            seed=options.seed,
            shuffle=options.shuffled,
            leak=images.leak,
            seconds=round(time.perf_counter() - started, 3),
            peak_memory_mib=round(peak.mib(), 1),
        )
        ratios = {
            name: value for result in results for name, value in result.sqnr_db.items()
        }
        return new_summary(model, calibration, self.float_result, ratios)

    def _summary_of_file(self, model: Any) -> Summary:
        """What the file says of its calibration; layers and sizes are those of the
        model itself.
        """
        assert (
            self._about is not None
        )  # load would have refused a calibrated file that says nothing
        ratios = {layer.name: layer.sqnr_db for layer in self._about.layers}
        skipped = skipped_layers(model, quantization(model))
        # A rebuilt model keeps float what calibration left so; the file says why.
        skipped |= {
            layer.name: layer.reason
            for layer in self._about.layers
            if layer.reason and layer.name in skipped
        }
        changes = dict(
            float_result=self.float_result or self._about.float_result,
            size=model_size(model),
            layers=layer_rows(model, skipped, ratios),
        )
        return Summary.of(self._about).model_copy(update=changes)

    def _say(self, summary: Summary) -> None:
        """Keeps a summary and writes it to ``summary.json``."""
        self.summary = summary
        if is_main_process():
            text = json.dumps(summary.to_dict(), indent=2) + '\n'
            write_text_atomically(text, self.work_dir / 'summary.json')

    def _write_model(self, model: Any, summary: Summary) -> None:
        """Writes ``quantized.pth`` and ``quantized.py``, the config for it."""
        if not is_main_process():
            return
        meta = {'dataset_meta': self._dataset_meta} if self._dataset_meta else {}
        content = {
            'meta': {**meta, 'mmptq': summary.about()},
            'state_dict': {
                key: value.cpu() for key, value in model.state_dict().items()
            },
        }
        checkpoint, config = (
            self.work_dir / 'quantized.pth',
            self.work_dir / 'quantized.py',
        )
        save_atomically(content, checkpoint)
        text = portable_config(self.cfg, summary.recipe).pretty_text
        write_text_atomically(text, config)
        self.logger.info(f'wrote {checkpoint} and {config}')

    def _write_packed(self, model: Any, summary: Summary) -> None:
        if self.options.pack and is_main_process():
            path = self.work_dir / 'quantized.safetensors'
            write_packed(model, self.cfg, summary.about(), self._dataset_meta, path)
            self.logger.info(f'wrote {path}')

    def _convert(self, model: Any, summary: Summary) -> Summary:
        """Makes the model one of integers, and says of every layer what computes it."""
        model.eval()
        paths = to_integer(model)
        self._converted = True
        counts = Counter(paths.values()).most_common()
        self.logger.info(
            f'the model is evaluated in integers; of its {len(paths)} quantized'
            ' operations run: '
            + '; '.join(f'{count} as {path}' for path, count in counts)
        )
        layers = [
            layer.model_copy(update=dict(path=paths.get(layer.name, 'float')))
            for layer in summary.layers
        ]
        return summary.model_copy(update=dict(layers=layers))


def new_summary(
    model: Any,
    calibration: CalibrationSummary,
    float_result: Result | None,
    sqnr_db: Mapping[str, float | None],
) -> Summary:
    """The summary of a model that was calibrated and is not evaluated yet.

    Args:
        model: The model.
        calibration: On what it was calibrated, and at what cost.
        float_result: The result of the float model, if that was evaluated.
        sqnr_db: By operation, see :class:`mmptq.calibration.BlockResult`.
    """
    report = quantization(model)
    recipe = report.recipe.to_dict()
    return Summary(
        schema=SCHEMA,
        version=__version__,
        method=report.recipe.method_name,
        recipe=recipe,
        bits=BitsSummary(**recipe['bits']),
        scope=report.scope,  # type: ignore[arg-type]  # checked when it is made
        calibration=calibration,
        float=float_result,
        quantized=None,
        size=model_size(model),
        layers=layer_rows(model, skipped_layers(model, report), sqnr_db),
    )


def skipped_layers(model: Any, report: ConversionReport) -> dict[str, FloatReason]:
    """Every layer of a model that stays float, with the reason."""
    if report.scope == 'model':
        return dict(report.skipped)
    inside = {f'backbone.{name}': reason for name, reason in report.skipped.items()}
    names = [
        name for name in layers_with_products(model) if not name.startswith('backbone.')
    ]
    return {**inside, **dict.fromkeys(names, FloatReason.OUTSIDE_OF_SCOPE)}


def log_images(logger: logging.Logger, images: CalibrationSet, wanted: int) -> None:
    """Says what the model is calibrated on."""
    name = type(images.dataset).__name__
    logger.info(
        f'calibration: {len(images.paths)} of {len(images.dataset)} images of {name}'
    )
    if len(images.paths) < wanted:
        logger.warning(
            f'calibration: {wanted} images were asked for, {name} has only'
            f' {len(images.paths)}'
        )
    if images.leak:
        logger.warning(
            'leak: the model is calibrated on images that it is evaluated on; its'
            ' metrics are no fair estimate'
        )
