"""Progress of the calibration: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..calibration import BlockResult


class BlockProgress:
    """Shows which block is calibrated, and how long the rest will take.

    Args:
        total: Number of blocks.
        logger: Gets a line a block where standard error is no terminal.
    """

    def __init__(self, total: int, logger: logging.Logger) -> None:
        self.total = total
        self.logger = logger
        self.count = 0
        self.started = time.perf_counter()
        console = Console(stderr=True)
        self.bar = (
            Progress(
                TextColumn('calibrating {task.description}'),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn('ETA'),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self.task = self.bar.add_task('', total=total) if self.bar else None

    def __enter__(self) -> BlockProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def start(self, name: str) -> None:
        """A block begins."""
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=name)

    def advance(self, result: BlockResult) -> None:
        """A block is done."""
        self.count += 1
        if self.bar and self.task is not None:
            self.bar.advance(self.task)
            return
        known = [
            value
            for value in result.sqnr_db.values()
            if value is not None and math.isfinite(value)
        ]
        seconds = time.perf_counter() - self.started
        eta = seconds / self.count * (self.total - self.count)
        worst = f', least SQNR {min(known):.1f} dB' if known else ''
        self.logger.info(
            f'calibrated [{self.count}/{self.total}] {result.name}{worst},'
            f' {seconds:.1f} s, eta {eta:.0f} s'
        )
