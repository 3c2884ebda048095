"""The whole road: config and checkpoint in; calibrated, evaluated and saved model out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ..backbones.presets import load_recipe, mixed_recipe, paper_protocol
from ..checkpoints.about import how_made
from ..checkpoints.packed import read_checkpoint
from ..checkpoints.reading import is_calibrated, safe_loading
from ..engine.calibration import inner_model
from ..engine.data import calibration_dataset, load_config
from ..engine.evaluation import evaluate_float, new_runner
from ..engine.hook import PTQHook
from ..engine.lock import locked
from ..engine.options import Options, options_of_call
from ..engine.ptq import PTQ
from ..errors import QuantizationError
from ..wrapping.configs import config_of_tests, float_config, quantized_config
from .testing import draw_predictions, dump_predictions, test_time_augmentation


def quantize(
    config: str | Config,
    checkpoint: str | Path,
    recipe: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantizes a detector or segmentor after training, and says what that costs.

    Args:
        config: A config of mmdet or mmsegmentation, as a file name, ``package::name``
            or object.
        checkpoint: Its checkpoint, float, or one that this function wrote, packed or
            not (then nothing is calibrated).
        recipe: ``METHOD_wXaY``, a config file that defines ``recipe``, or the recipe
            itself; by default that of a quantized checkpoint, else ``adalog_w4a4``.
        options: The other fields of :class:`mmptq.engine.options.Options`, which says
            what each does; docs/schema/options.json lists them.

    Returns:
        What ``summary.json`` holds (docs/schema/summary.json).

    Raises:
        QuantizationError: If something does not fit; before long work where it can be
            known.
    """
    return run(config, str(checkpoint), options_of_call({**options, 'recipe': recipe}))


def run(config: str | Config, checkpoint: str, options: Options) -> dict[str, Any]:
    """Does what :func:`quantize` says, with options that were checked."""
    # First: what a config imports may register quantizers and methods of the user's.
    user_cfg = load_config(config, options.cfg_options)
    loaded = read_checkpoint(checkpoint)
    made = how_made(loaded, checkpoint)
    asked = options.asked_recipe() or (made.recipe if made else 'adalog_w4a4')
    recipe = load_recipe(asked)
    if options.as_in_paper:
        recipe = paper_protocol(recipe)
    recipe = mixed_recipe(recipe, options.keep_float, options.layer_bits)
    scope = options.scope or (made.scope if made else 'backbone')

    cfg = run_config(user_cfg, options, recipe['name'])
    work_dir = Path(cfg.work_dir)
    check_writable(work_dir)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset = calibration_dataset(cfg, options.calib_config, options.on_test)
    options = options.model_copy(update=dict(dataset=dataset))

    with safe_loading(), locked(work_dir, options.launcher):
        quantizable = quantized_config(cfg, recipe, scope)
        runner = build_runner(quantizable, options)
        described = with_hook(quantizable, options)
        work = PTQ(options, described, work_dir, runner.logger, checkpoint)
        runner.register_hook(PTQHook(work))
        model = inner_model(runner.model)

        def test_set() -> Any:
            return runner.test_loop.dataloader.dataset

        # The hooks of the Runner get the checkpoint as if the Runner had read it; ours
        # loads it.
        runner.call_hook('after_load_checkpoint', checkpoint=loaded)
        if not is_calibrated(model):
            work.prepare(model, test_set)
        if options.float_eval and options.evaluate and 'packed' not in loaded:
            work.float_result = evaluate_float(float_run_config(cfg, options), loaded)
        if options.evaluate:
            runner.test()
        else:
            work.run(model, test_set)
            work.forget_progress()
    assert work.summary is not None  # the model was tested, or the work was run
    return work.summary.to_dict()


def run_config(cfg: Config, options: Options, recipe: str) -> Config:
    """The config of the float model in this run, which has a work_dir and loads nothing
    by itself.

    Args:
        cfg: The user's config.
        options: The options of the run.
        recipe: The recipe's name, part of the default work_dir.
    """
    cfg = config_of_tests(cfg)
    cfg.launcher = options.launcher
    stem = Path(cfg.filename).stem if cfg.filename else 'model'
    default = cfg.get('work_dir') or os.path.join('work_dirs', f'{stem}_{recipe}')
    cfg.work_dir = str(options.work_dir or default)
    cfg.load_from = None
    cfg.resume = False
    return cfg


def with_hook(cfg: Config, options: Options) -> Config:
    """A config that says by its PTQHook how its model is calibrated."""
    cfg = deepcopy(cfg)
    cfg.custom_hooks = [
        *cfg.custom_hooks,
        dict(type='mmptq.PTQHook', **options.of_hook()),
    ]
    return cfg


def float_run_config(cfg: Config, options: Options) -> Config:
    """The config of the float model's evaluation."""
    cfg = float_config(cfg)
    if options.tta:
        test_time_augmentation(cfg)
    return cfg


def build_runner(cfg: Config, options: Options) -> Runner:
    """The Runner that calibrates and evaluates the quantizable model of a config.

    Raises:
        QuantizationError: If the config cannot be built.
    """
    cfg = deepcopy(cfg)
    if options.show or options.show_dir:
        folder = str(options.show_dir) if options.show_dir else None
        draw_predictions(cfg, options.show, folder, options.wait_time)
    if options.out:
        dump_predictions(cfg, str(options.out))
    if options.tta:
        test_time_augmentation(cfg)
    try:
        return new_runner(cfg)
    except QuantizationError:
        raise
    except Exception as error:  # what a config names may raise anything
        raise QuantizationError(
            f'the config cannot be built: {type(error).__name__}: {error}'
        ) from error


def check_writable(work_dir: Path) -> None:
    """Raises QuantizationError if results cannot be written to a directory."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        probe = work_dir / '.mmptq_probe'
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise QuantizationError(
            f'work_dir {work_dir} cannot be written to: {error.strerror}; name another'
            ' one with --work-dir'
        ) from None
