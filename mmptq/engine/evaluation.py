"""Evaluations, timed with their data pipeline and without the start."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, load_state_dict

from ..analysis.summary import Result
from ..checkpoints.reading import without_prefix
from .calibration import inner_model

_RUNS = itertools.count()


def test_result(
    metrics: Mapping[str, Any] | None, seconds: float, backend: str | None = None
) -> Result:
    """The result of an evaluation.

    Args:
        metrics: By name. One that is NaN (a class without objects) becomes None: JSON
            has no NaN.
        seconds: How long it took.
        backend: What computed it, said of a quantized model.
    """
    numbers = {name: float(value) for name, value in (metrics or {}).items()}
    known = {
        name: None if math.isnan(value) else value for name, value in numbers.items()
    }
    said = {} if backend is None else dict(backend=backend)
    return Result(metrics=known, seconds=round(seconds, 3), **said)


def new_runner(cfg: Config) -> Runner:
    """A Runner with a logger of its own.

    mmengine finds loggers by config name and second, so a second Runner of the same
    config within that second would write to the first one's log file and to a standard
    output that may be closed by now.
    """
    name = cfg.get('experiment_name') or Path(cfg.filename or 'model').stem
    cfg.experiment_name = f'{name}_{next(_RUNS)}'
    return Runner.from_cfg(cfg)


class Evaluation(Hook):
    """Times the evaluation of a float model."""

    def before_test_epoch(self, runner: Runner) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def after_test_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Keeps the result."""
        self.result = test_result(metrics, time.perf_counter() - self.started)


def evaluate_float(cfg: Config, checkpoint: Mapping[str, Any]) -> Result:
    """The result of a float model.

    Args:
        cfg: Its config, without PTQHook.
        checkpoint: What was read of its file.
    """
    runner = new_runner(cfg)
    evaluation = Evaluation()
    runner.register_hook(evaluation)
    runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    state = without_prefix(checkpoint['state_dict'])
    load_state_dict(inner_model(runner.model), state, logger=runner.logger)
    runner.test()
    return evaluation.result
