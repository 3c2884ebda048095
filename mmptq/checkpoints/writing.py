"""Files that are there whole or not at all, also after a loss of power."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def save_atomically(data: Any, path: Path) -> None:
    """``torch.save`` to a file that is there whole or not at all."""
    write_atomically(path, lambda temporary: torch.save(data, temporary))


def write_text_atomically(text: str, path: Path) -> None:
    """Writes a text file that is there whole or not at all."""

    def write(temporary: str) -> None:
        Path(temporary).write_text(text, encoding='utf-8')

    write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Calls ``write(temporary)``, brings the file that it wrote to disk, and renames it
    to ``path``.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _flush(path.parent)  # the new name is on disk, too


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
