"""Peak memory and time to wrap and calibrate a whole detector.

    python benchmarks/calibration_memory.py CONFIG [--recipe adalog_w4a4_fast] [--images 32] [--size 800 1216] [--json FILE]

Weights are random and images are noise: only the cost is measured. Scope backbone; the
peak is that of the process, with the model, from before it is built.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import parser, report
from mmengine.registry import MODELS, init_default_scope

from mmptq.apis import load_recipe
from mmptq.checkpoints.reading import is_calibrated
from mmptq.engine.calibration import calibrate_model
from mmptq.engine.data import CalibrationSet, load_config
from mmptq.engine.memory import Peak
from mmptq.wrapping.configs import quantized_config


class Noise:
    """A data set of images of noise, as mmdet's test pipelines give them."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __getitem__(self, index: int) -> dict[str, Any]:
        from mmdet.structures import DetDataSample

        sample = DetDataSample(
            metainfo=dict(
                img_id=index,
                ori_shape=self.size,
                img_shape=self.size,
                scale_factor=(1.0, 1.0),
            )
        )
        generator = torch.Generator().manual_seed(index)
        return dict(
            inputs=torch.randint(
                256, (3, *self.size), dtype=torch.uint8, generator=generator
            ),
            data_samples=sample,
        )


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('config')
    args.add_argument('--recipe', default='adalog_w4a4_fast')
    args.add_argument('--images', type=int, default=32)
    args.add_argument(
        '--size', type=int, nargs=2, default=[800, 1216], help='height and width'
    )
    options = args.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    cfg = load_config(options.config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)

    peak = Peak(torch.device('cpu'))
    started = time.perf_counter()
    model = MODELS.build(
        quantized_config(cfg, load_recipe(options.recipe), 'backbone').model
    )
    built = time.perf_counter()
    model.backbone.init_weights()
    images = CalibrationSet(
        Noise(tuple(options.size)),
        list(range(options.images)),
        ['noise'] * options.images,
        False,
    )
    calibrating = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calibrate_model(
            model, images, 0, logging.getLogger(), Path(folder) / 'progress.pth'
        )
    seconds = time.perf_counter() - calibrating
    if not is_calibrated(model):
        raise RuntimeError(f'{options.config} was not calibrated')
    row = {
        'model': Path(options.config.partition('::')[2] or options.config).stem,
        'recipe': options.recipe,
        'images': options.images,
        'parameters, M': (
            sum(parameter.numel() for parameter in model.parameters()) / 1e6
        ),
        'build and wrap, s': built - started,
        'calibration, s': seconds,
        'peak memory, MiB': peak.mib(),
    }
    about = dict(
        config=options.config,
        scope='backbone',
        bits=load_recipe(options.recipe)['bits'],
        size=options.size,
        data='noise',
    )
    report(
        f'memory of a calibration, {options.images} images of'
        f' {options.size[0]}x{options.size[1]}, scope backbone',
        [row],
        about,
        options.json,
    )


if __name__ == '__main__':
    main()
