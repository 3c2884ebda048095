"""One run at a time in a work_dir."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import QuantizationError

LOCK = '.mmptq.lock'
RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}
"""Where each launcher says which process this one is."""


@contextmanager
def locked(work_dir: Path, launcher: str = 'none') -> Iterator[None]:
    """Within it no other run writes to a directory; the lock ends with the process,
    however that ends.

    Args:
        work_dir: The directory.
        launcher: What started the run. Of several processes the first one holds the
            lock for all.

    Raises:
        QuantizationError: If another run holds it.
    """
    if int(os.environ.get(RANKS.get(launcher, ''), '0')) != 0:
        yield
        return
    lock = FileLock(work_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise QuantizationError(
            f'another run writes to work_dir {work_dir}; wait for it, or name another'
            ' one with --work-dir'
        ) from None
    try:
        yield
    finally:
        lock.release()
