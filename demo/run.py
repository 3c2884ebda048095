"""The demo: quantizes the bundled models and prints what that costs. `make demo` runs
it.

Usage: python demo/run.py [--work-dir work_dirs/demo] [--models mask-rcnn_swin-demo
    upernet_swin-demo]
"""

import argparse
from pathlib import Path

from generate_data import generate
from rich.console import Console

from mmptq.analysis.table import result_table
from mmptq.apis import compare

DEMO = Path(__file__).resolve().parent
MODELS = ('mask-rcnn_swin-demo', 'upernet_swin-demo')
RECIPES = ('minmax_w8a8', 'adalog_w8a8_fast', 'minmax_w4a4', 'adalog_w4a4_fast')


def main() -> None:
    """Runs every recipe on every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS)
    parser.add_argument('--recipes', nargs='+', default=RECIPES)
    parser.add_argument('--calib-images', type=int, default=16)
    args = parser.parse_args()

    generate(DEMO / 'data')
    tables = []
    for model in args.models:
        config, checkpoint = (
            DEMO.parent / 'configs' / 'demo' / f'{model}.py',
            DEMO / f'{model}.pth',
        )
        summaries = compare(
            str(config),
            str(checkpoint),
            args.recipes,
            args.work_dir / model,
            calib_images=args.calib_images,
        )
        tables.append(result_table(summaries, title=model))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for table in tables:
        console.print(table)
    console.print(
        f'Every layer, its quantizers and its SQNR: {args.work_dir}/*/*/summary.json'
    )


if __name__ == '__main__':
    main()
