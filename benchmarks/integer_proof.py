"""Whether a model in integers is its simulation, code by code, on the evaluation images
of a config (mmptq/runtime/lockstep.py).

    python benchmarks/integer_proof.py CONFIG CHECKPOINT [--recipes minmax_w8a8 adalog_w4a4_fast ...] [--images 8] [--json FILE]

The backbone, calibrated on train images. `moved`: activations whose code is another one
than the simulation gives to the same inputs;
`farthest`: how far from the edge between the two codes they lie, in steps; `values`:
difference between what a code is worth in both, over the tensor's largest value;
`error`: relative error of the backbone's maps, the simulation with the codes of the
integers (the largest of all images, all three); `apart`: the same, each with its own
codes, the median of the images.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from typing import Any

import torch
from common import parser, report
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmptq.apis import quantize
from mmptq.apis.packed import load_packed
from mmptq.engine.data import load_config
from mmptq.runtime import to_integer
from mmptq.runtime.lockstep import lockstep


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('config')
    args.add_argument('checkpoint')
    args.add_argument(
        '--recipes',
        nargs='+',
        default=[
            'minmax_w8a8',
            'minmax_w8a8_symmetric',
            'adalog_w4a4_fast',
            'uqvit_w4a4_fast',
        ],
    )
    args.add_argument('--images', type=int, default=8)
    args.add_argument('--calib-images', type=int, default=32)
    options = args.parse_args()
    if min(options.images, options.calib_images) < 1:
        args.error('--images and --calib-images are to be at least 1')
    cfg, rows = load_config(options.config), []
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    batches = [
        batch
        for batch, _ in zip(
            Runner.build_dataloader(cfg.test_dataloader),
            range(options.images),
            strict=False,
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes:
            work_dir = f'{folder}/{recipe}'
            made = quantize(
                options.config,
                options.checkpoint,
                recipe,
                work_dir=work_dir,
                calib_images=options.calib_images,
                float_eval=False,
                evaluate=False,
                pack=True,
            )
            model: Any = load_packed(f'{work_dir}/quantized.safetensors')
            integers = copy.deepcopy(model.backbone)
            to_integer(integers, fuse=False)
            found = [
                lockstep(
                    model.backbone,
                    integers,
                    model.data_preprocessor(copy.deepcopy(batch), False)['inputs'],
                )
                for batch in batches
            ]
            worst = {
                name: float(torch.tensor([getattr(each, name) for each in found]).max())
                for name in ('farthest', 'values', 'error')
            }
            rows.append(
                dict(
                    recipe=recipe,
                    codes=sum(each.codes for each in found),
                    moved=sum(each.moved for each in found),
                    **worst,
                    apart=statistics.median(each.apart for each in found),
                )
            )
    about = dict(
        config=options.config.rsplit('/', 1)[-1],
        scope=made['scope'],
        images=len(batches),
        calibration=made['calibration'],
    )
    report('integers and simulation in step', rows, about, options.json)


if __name__ == '__main__':
    with torch.no_grad():
        main()
