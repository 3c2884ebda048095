"""How much memory there is, and how much was needed."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

MIB = 2**20


def available() -> int | None:
    """Memory that can still be taken, bytes: of the machine, or of the container if
    that has less. None if unknown.
    """
    found = []
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        found += [
            int(line.split()[1]) * 1024
            for line in meminfo.read_text().splitlines()
            if line.startswith('MemAvailable:')
        ]
    limit, used = (
        Path('/sys/fs/cgroup/memory.max'),
        Path('/sys/fs/cgroup/memory.current'),
    )
    if limit.exists() and used.exists() and limit.read_text().strip() != 'max':
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)


class Peak:
    """The largest memory in use since it was made: of the GPU if the model is on one,
    else of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                Path('/proc/self/clear_refs').write_text(
                    '5'
                )  # Linux: resets the high-water mark
            except OSError:
                pass

    def mib(self) -> float:
        """The peak so far, MiB."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device) / MIB
        status = Path('/proc/self/status')
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith('VmHWM:'):
                    return int(line.split()[1]) / 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / MIB if sys.platform == 'darwin' else peak / 1024
