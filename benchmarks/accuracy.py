"""Accuracy of several recipes on one model: the same weights and the same images for
all.

python benchmarks/accuracy.py CONFIG CHECKPOINT [--recipes minmax_w8a8 adalog_w4a4 ...] [--json FILE]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import parser, report

from mmptq.apis import compare

RECIPES = [
    f'{method}_w{bits}a{bits}'
    for bits in (8, 6, 4, 3)
    for method in ('minmax', 'log2', 'logsqrt2', 'adalog')
]


def row(
    name: str, result: dict[str, Any], mib: float, calibration: float
) -> dict[str, Any]:
    """A row of the table."""
    headline = {
        key: value
        for key, value in result['metrics'].items()
        if key.endswith(('bbox_mAP', 'segm_mAP', 'mIoU', 'aAcc'))
    }
    return dict(
        recipe=name,
        **headline,
        size_mib=mib,
        evaluation_s=result['seconds'],
        calibration_s=calibration,
    )


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('config')
    args.add_argument('checkpoint')
    args.add_argument('--recipes', nargs='+', default=RECIPES)
    args.add_argument('--scope', default='backbone', choices=['backbone', 'model'])
    args.add_argument('--calib-images', type=int, default=32)
    options = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summaries = compare(
            options.config,
            options.checkpoint,
            options.recipes,
            Path(folder),
            scope=options.scope,
            calib_images=options.calib_images,
        )
    first = summaries[0]
    rows = [row('float', first['float'], first['size']['float_mib'], 0.0)]
    rows += [
        row(
            summary['recipe']['name'],
            summary['quantized'],
            summary['size']['quantized_mib'],
            summary['calibration']['seconds'],
        )
        for summary in summaries
    ]
    bits = {summary['recipe']['name']: summary['bits'] for summary in summaries}
    about = dict(
        config=Path(options.config).name,
        scope=options.scope,
        bits=bits,
        calibration=first['calibration'],
    )
    title = (
        f'{Path(options.config).stem}, scope {options.scope},'
        f' {first["calibration"]["images"]} calibration images'
    )
    report(title, rows, about, options.json)


if __name__ == '__main__':
    main()
