"""The whole road: config and checkpoint in; calibrated, evaluated and saved model out."""
from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ..analysis.summary import Result
from ..backbones.presets import load_recipe, paper_protocol
from ..checkpoints.about import how_made
from ..checkpoints.packed import read_checkpoint
from ..checkpoints.reading import is_calibrated, safe_loading
from ..engine.calibration import inner_model
from ..engine.data import calibration_dataset, load_config
from ..engine.hook import PTQHook, load_verified, test_result
from ..errors import QuantizationError
from ..wrapping.configs import config_of_tests, float_config, quantized_config
from .testing import draw_predictions, dump_predictions, test_time_augmentation

SCOPES = ('backbone', 'model')
PAPER_IMAGES = 2
"""Calibration images of UQ-ViT's official detection code."""
_RUNS = itertools.count()


def quantize(config: str | Config, checkpoint: str, recipe: str | Mapping[str, Any] | None = None, *, scope: str | None = None,
             work_dir: str | None = None, cfg_options: Mapping[str, Any] | None = None, launcher: str = 'none',
             calib_images: int = 32, calib_cfg: str | None = None, calib_on_test: bool = False, as_in_paper: bool = False, seed: int = 0,
             float_eval: bool = True, evaluate: bool = True, resume: bool = False, pack: bool = False, backend: str = 'simulated',
             out: str | None = None, show: bool = False, show_dir: str | None = None, wait_time: float = 2,
             tta: bool = False) -> dict[str, Any]:
    """Quantizes a detector or segmentor after training, and says what that costs.

    Args:
        config: A config of mmdet or mmsegmentation, as a file name, ``package::name`` or object.
        checkpoint: Its checkpoint, float, or one that this function wrote, packed or not (then nothing is calibrated).
        recipe: ``METHOD_wXaY``, a config file that defines ``recipe``, or the recipe itself; by default that of a quantized checkpoint,
            else ``adalog_w4a4``.
        scope: ``backbone``, or ``model`` for neck and heads too; by default that of a quantized checkpoint, else ``backbone``.
        work_dir: Where ``quantized.pth``, ``quantized.py`` and ``summary.json`` go; by default
            ``work_dirs/CONFIG_RECIPE``.
        cfg_options: Changes of the config, as in OpenMMLab's tools.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``. Each process calibrates on the same images.
        calib_images: Calibration images, drawn from the train set.
        calib_cfg: A config whose train_dataloader is used instead.
        calib_on_test: Calibrate on evaluation images. A leak.
        as_in_paper: With a UQ-ViT recipe: as its official detection code, on the first two evaluation images (a leak), inputs of
            convolutions at 8 bits, no NormQuant before fc2. (The published results are of scope ``model``.)
        seed: Of the draw of images and tokens.
        float_eval: Evaluate the float model first, unless the checkpoint is packed and has none.
        evaluate: Evaluate at all.
        resume: Go on after the last block that an interrupted run in the same work_dir calibrated.
        pack: Write ``quantized.safetensors`` too, with packed weights.
        backend: How the quantized model is evaluated: ``simulated``, or ``integer``.
        out: Where predictions of the quantized model go: a pickle file, for mmsegmentation a directory.
        show: Show predictions.
        show_dir: Where painted predictions go.
        wait_time: Interval of ``show``, s.
        tta: Evaluate with test-time augmentation.

    Returns:
        What ``summary.json`` holds.

    Raises:
        QuantizationError: If something does not fit; before long work where it can be known.
    """
    checkpoint = str(checkpoint)
    loaded = read_checkpoint(checkpoint)
    made = how_made(loaded, checkpoint)
    recipe_cfg = load_recipe(recipe or (made.recipe if made else 'adalog_w4a4'))
    scope = scope or (made.scope if made else 'backbone')
    if as_in_paper:
        if calib_cfg is not None:
            raise QuantizationError('the paper protocol calibrates on evaluation images: --calib-cfg has no place in it')
        recipe_cfg, calib_images, calib_on_test = paper_protocol(recipe_cfg), PAPER_IMAGES, True
    if scope not in SCOPES:
        raise QuantizationError(f'unknown scope {scope!r}: it is one of {", ".join(SCOPES)}')
    if backend != 'simulated' and not evaluate:
        raise QuantizationError(f'the backend {backend} is how the model is evaluated, and it is not to be; leave out one of the two')
    if not 0 <= seed < 2**63:
        raise QuantizationError(f'seed {seed}: it is a number from 0 to 2^63 - 1')
    cfg = load_config(config, cfg_options)
    cfg.launcher = launcher
    cfg = config_of_tests(cfg)
    stem = Path(cfg.filename).stem if cfg.filename else 'model'
    cfg.work_dir = str(work_dir or '') or cfg.get('work_dir') or os.path.join('work_dirs', f'{stem}_{recipe_cfg["name"]}')
    check_writable(Path(cfg.work_dir))
    cfg.load_from = checkpoint
    cfg.resume = False
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    cfg.custom_hooks = [*cfg.custom_hooks, dict(
        type='mmptq.PTQHook', images=calib_images, seed=seed, on_test=calib_on_test, shuffle=not as_in_paper, resume=resume, pack=pack,
        backend=backend, dataset=calibration_dataset(cfg, calib_cfg, calib_on_test))]
    with safe_loading():
        quantized = quantized_config(cfg, recipe_cfg, scope)
        runner = build_runner(quantized, out, show, show_dir, wait_time, tta)
        hook = next(hook for hook in runner.hooks if isinstance(hook, PTQHook))
        hook.config = quantized
        load_verified(inner_model(runner.model), loaded, checkpoint)
        if not is_calibrated(inner_model(runner.model)):
            hook.prepare(runner)
        if float_eval and evaluate and 'packed' not in loaded:
            hook.float_result = evaluate_float(cfg, tta)
        if evaluate:
            runner.test()
        else:
            runner.load_or_resume()
            hook.before_test(runner)
            hook.forget_progress(runner)
    assert hook.summary is not None
    return hook.summary.to_dict()


def build_runner(cfg: Config, out: str | None, show: bool, show_dir: str | None, wait_time: float, tta: bool) -> Runner:
    """The Runner that calibrates and evaluates the quantized model of a config.

    Raises:
        QuantizationError: If the config cannot be built.
    """
    cfg = deepcopy(cfg)
    if show or show_dir:
        draw_predictions(cfg, show, show_dir, wait_time)
    if out:
        dump_predictions(cfg, out)
    if tta:
        test_time_augmentation(cfg)
    try:
        return new_runner(cfg)
    except QuantizationError:
        raise
    except Exception as error:  # what a config names may raise anything
        raise QuantizationError(f'the config cannot be built: {type(error).__name__}: {error}') from error


def new_runner(cfg: Config) -> Runner:
    """A Runner with a logger of its own: mmengine finds loggers by config name and second, so a second Runner of the same config
    within that second would write to the first one's log file and to a standard output that may be closed by now."""
    cfg.experiment_name = f'{cfg.get("experiment_name") or Path(cfg.filename or "model").stem}_{next(_RUNS)}'
    return Runner.from_cfg(cfg)


class _Evaluation(Hook):
    """Times an evaluation, with the data pipeline and without the start."""

    def before_test_epoch(self, runner: Runner) -> None:
        self.started = time.perf_counter()

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.result = test_result(metrics, time.perf_counter() - self.started)


def evaluate_float(cfg: Config, tta: bool = False) -> Result:
    """Metrics and seconds of the float model of a config, unwrapped, with the checkpoint of ``load_from``."""
    cfg = float_config(cfg)
    if tta:
        test_time_augmentation(cfg)
    runner = new_runner(cfg)
    evaluation = _Evaluation()
    runner.register_hook(evaluation)
    runner.test()
    return evaluation.result


def check_writable(work_dir: Path) -> None:
    """Raises QuantizationError if results cannot be written to a directory."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        probe = work_dir / '.mmptq_probe'
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise QuantizationError(f'work_dir {work_dir} cannot be written to: {error.strerror}; name another one with --work-dir') from None
