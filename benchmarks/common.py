"""What all benchmarks share: a description of the machine, and a table with a JSON
file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmptq.version import __version__

INSTRUCTIONS = 'avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_int8', 'amx_bf16'
"""Those that the speed of a product depends on."""


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next(
        (line.split(':')[1].strip() for line in lines if line.startswith('model name')),
        platform.processor(),
    )
    flags = next((line.split() for line in lines if line.startswith('flags')), [])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        cpu=cpu,
        instructions=[name for name in INSTRUCTIONS if name in flags],
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=gpu,
        python=platform.python_version(),
        mmptq=__version__,
        torch=torch.__version__,
        **{
            name: import_module(name).__version__
            for name in ('mmcv', 'mmengine', 'mmdet', 'mmseg')
        },
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of every benchmark."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument('--json', type=Path, help='file for the result')
    return result


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    path: Path | None,
) -> None:
    """Prints rows as a table and writes them, with the machine and ``about`` (scope,
    bits, data), as JSON.
    """
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(
            column, justify='left' if isinstance(rows[0][column], str) else 'right'
        )
    for row in rows:
        table.add_row(
            *(
                f'{value:.4g}' if isinstance(value, float) else str(value)
                for value in row.values()
            )
        )
    Console(width=140).print(table)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                dict(
                    benchmark=title,
                    machine=machine(),
                    about=dict(about),
                    rows=list(rows),
                ),
                indent=2,
            )
            + '\n'
        )
