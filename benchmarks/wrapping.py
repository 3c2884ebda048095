"""Time to wrap the backbone of each model of configs/mmdet and configs/mmseg, beside
the time to build the model.

    python benchmarks/wrapping.py [CONFIG ...] [--repeats 3] [--threads 1] [--json FILE]

Models are of full size, with random weights. Wrapping is what mmptq.QuantBackbone does
once the float backbone is built: it reads the recipe and converts the layers. Medians
of the repeats. By default all *_adalog-w4a4.py; other recipes convert the same layers.
ViTDet's needs MMDET and PYTHONPATH, as its config says, and is left out without them.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from common import parser, report
from mmengine.registry import init_default_scope

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.backbones.build import build_float
from mmptq.calibration import operations
from mmptq.engine.data import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / 'configs').glob('mm*/*_adalog-w4a4.py'))
    if 'MMDET' in os.environ or 'vitdet' not in path.name
]


def measure(config: str, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    cfg = load_config(str(ROOT / config))
    init_default_scope(cfg.default_scope)
    wrapper = cfg.model.backbone
    builds, wraps = [], []
    for _ in range(repeats):
        plain = deepcopy(
            {**cfg.model, 'backbone': wrapper.backbone}
        )  # DINO adds to its own
        started = time.perf_counter()
        model = build_float(plain)
        built = time.perf_counter()
        convert(
            model.backbone,
            find_spec(model.backbone),
            Recipe.from_dict(load_recipe(wrapper.recipe)),
        )
        builds.append(built - started)
        wraps.append(time.perf_counter() - built)
    return {
        'model': f'{cfg.default_scope}/{Path(config).stem.partition("_adalog")[0]}',
        'parameters, M': (
            sum(parameter.numel() for parameter in model.parameters()) / 1e6
        ),
        'quantized operations': len(operations(model)),
        'build, s': statistics.median(builds),
        'wrap, s': statistics.median(wraps),
    }


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('configs', nargs='*', default=CONFIGS)
    args.add_argument('--repeats', type=int, default=3)
    args.add_argument('--threads', type=int, default=1)
    options = args.parse_args()
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    rows = []
    for config in options.configs:
        rows.append(measure(config, options.repeats))
        logging.info(rows[-1])
    about = dict(
        scope='backbone',
        recipe='adalog_w4a4',
        repeats=options.repeats,
        longest_wrap_s=max(row['wrap, s'] for row in rows),
    )
    report('time to wrap, beyond building', rows, about, options.json)


if __name__ == '__main__':
    main()
