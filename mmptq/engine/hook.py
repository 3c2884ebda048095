"""PTQHook: WHEN a model is quantized in a Runner; :mod:`mmptq.engine.ptq` does it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..checkpoints.reading import is_calibrated
from ..errors import QuantizationError
from ..registry import HOOKS
from .calibration import inner_model
from .options import options_of_hook
from .ptq import PTQ


@HOOKS.register_module()
class PTQHook(Hook):
    """Calibrates a quantizable model before it is tested, unless its checkpoint is
    calibrated already.

    Args:
        work: The work that is under way; by default one on the Runner's model.
        options: Those of :class:`Options` that have a name in the hook.
    """

    priority = 'VERY_LOW'

    def __init__(self, work: PTQ | None = None, **options: Any) -> None:
        self._options, self._work, self._started = options_of_hook(options), work, 0.0

    def work(self, runner: Runner) -> PTQ:
        """The work on the Runner's model."""
        if self._work is None:
            source = str(runner.cfg.get('load_from', 'the checkpoint'))
            folder = Path(runner.work_dir)
            self._work = PTQ(self._options, runner.cfg, folder, runner.logger, source)
        return self._work

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Checks what the Runner read."""
        self.work(runner).load(inner_model(runner.model), checkpoint)

    def before_test(self, runner: Runner) -> None:
        """Calibrates, where that is to be done."""
        self.work(runner).run(
            inner_model(runner.model), lambda: runner.test_loop.dataloader.dataset
        )

    def before_val(self, runner: Runner) -> None:
        """Raises QuantizationError if the model is not calibrated: only a test
        calibrates.
        """
        if not is_calibrated(inner_model(runner.model)):
            raise QuantizationError(
                'the quantized model is not calibrated, and a validation does not do'
                ' that; run a test'
            )

    def before_test_epoch(self, runner: Runner) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def after_test_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Hands over the metrics."""
        self.work(runner).evaluated(metrics, time.perf_counter() - self._started)
