"""Accuracy of one quantized model, simulated in float32 and float64 and run in
integers: the same checkpoint and images.

    python benchmarks/integer_accuracy.py CONFIG CHECKPOINT [--recipes minmax_w8a8 adalog_w4a4_fast ...] [--cfg-options ...] [--json FILE]

float64 is what both float32 and integers round: how far float32 is from it is what the
simulation's own rounding does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import parser, report
from mmengine.config import DictAction
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmptq.apis import quantize
from mmptq.engine.calibration import inner_model
from mmptq.engine.data import load_config


@HOOKS.register_module()
class DoubleBackbone(Hook):
    """Computes the backbone in float64 once the checkpoint is loaded."""

    def before_test_epoch(self, runner: Runner) -> None:
        """Converts it, its inputs and its outputs."""
        backbone = inner_model(runner.model).backbone.double()
        backbone.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        backbone.register_forward_hook(
            lambda _, args, output: tuple(each.float() for each in output)
        )


def row(recipe: str, backend: str, result: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    headline = {
        key: value
        for key, value in result['metrics'].items()
        if key.endswith(('bbox_mAP', 'segm_mAP', 'mIoU', 'aAcc'))
    }
    return dict(recipe=recipe, backend=backend, **headline)


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('config')
    args.add_argument('checkpoint')
    args.add_argument(
        '--recipes',
        nargs='+',
        default=['minmax_w8a8', 'adalog_w4a4_fast', 'uqvit_w4a4_fast'],
    )
    args.add_argument('--calib-images', type=int, default=32)
    args.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='changes of the config, as of its test images',
    )
    options = args.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes:
            work_dir = Path(folder) / recipe
            first = quantize(
                options.config,
                options.checkpoint,
                recipe,
                work_dir=str(work_dir),
                calib_images=options.calib_images,
                float_eval=False,
                cfg_options=options.cfg_options,
            )
            made = str(work_dir / 'quantized.pth')
            double = load_config(options.config)
            double.merge_from_dict(options.cfg_options)
            double.custom_hooks = [dict(type='DoubleBackbone', priority='LOWEST')]
            results = {
                'simulated, float64': quantize(
                    double, made, work_dir=str(work_dir / 'double'), float_eval=False
                ),
                'simulated, float32': first,
                'integer': quantize(
                    options.config,
                    made,
                    work_dir=str(work_dir / 'integer'),
                    float_eval=False,
                    backend='integer',
                    cfg_options=options.cfg_options,
                ),
            }
            rows += [
                row(recipe, backend, summary['quantized'])
                for backend, summary in results.items()
            ]
    about = dict(
        config=Path(options.config).name,
        changes=options.cfg_options,
        scope=first['scope'],
        calibration=first['calibration'],
    )
    report(
        f'{Path(options.config).stem}, simulated and in integers',
        rows,
        about,
        options.json,
    )


if __name__ == '__main__':
    main()
