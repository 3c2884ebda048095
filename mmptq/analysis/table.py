"""The table that a run ends with: results side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

HEADLINES = ('bbox_mAP', 'segm_mAP', 'mIoU', 'aAcc', 'top1')
"""Metrics shown in the table, by the end of their name; all where there is none of
these.
"""


def result_table(
    summaries: Sequence[Mapping[str, Any]], title: str = 'measured'
) -> Table:
    """Float and quantized results side by side; the float row is the first summary's.

    Args:
        summaries: What ``summary.json`` holds, of one model at one scope and on one set
            of images.
        title: What the table's title begins with.
    """
    first = summaries[0]
    metrics = _headlines(first['quantized'] or first['float'])
    table = Table(title=escape(f'{title}: {_setting(first)}'))
    for column in (
        'recipe',
        'W/A/softmax',
        'backend',
        *metrics,
        'size MiB',
        'eval s',
        'calib s',
    ):
        side = 'left' if column in ('recipe', 'backend') else 'right'
        table.add_column(escape(column), justify=side, no_wrap=True)  # type: ignore[arg-type]

    if first['float']:
        table.add_row(*_float_row(first, metrics))
    for summary in summaries:
        table.add_row(*_quantized_row(summary, metrics))
    return table


def _setting(summary: Mapping[str, Any]) -> str:
    """Scope and calibration images of a run."""
    calibration = summary['calibration']
    leak = ' (leak)' if calibration['leak'] else ''
    return (
        f'scope {summary["scope"]}, calibrated on {calibration["images"]} images of '
        f'{calibration["dataset"]} {calibration["split"]}{leak}'
    )


def _float_row(summary: Mapping[str, Any], metrics: list[str]) -> list[str]:
    result = summary['float']
    size = f'{summary["size"]["float_mib"]:.2f}'
    return [
        'float',
        '32 bit',
        '',
        *_values(result, metrics),
        size,
        f'{result["seconds"]:.1f}',
        '',
    ]


def _quantized_row(summary: Mapping[str, Any], metrics: list[str]) -> list[str]:
    bits, result = summary['bits'], summary['quantized']
    about = [
        summary['recipe']['name'],
        f'{bits["weight"]}/{bits["activation"]}/{bits["softmax"]}',
        result['backend'] if result else '-',
    ]
    cost = [
        f'{summary["size"]["quantized_mib"]:.2f}',
        f'{result["seconds"]:.1f}' if result else '-',
        f'{summary["calibration"]["seconds"]:.1f}',
    ]
    return [*about, *_values(result, metrics), *cost]


def _headlines(result: Mapping[str, Any] | None) -> list[str]:
    if not result:
        return []
    names = list(result['metrics'])
    return [name for name in names if name.endswith(HEADLINES)] or names


def _values(result: Mapping[str, Any] | None, metrics: list[str]) -> list[str]:
    values = [result['metrics'][name] if result else None for name in metrics]
    return ['-' if value is None else f'{value:.4g}' for value in values]
