"""Time and memory of a calibration, in float passes over the same images.

    python benchmarks/calibration_cost.py swin [--images 32] [--recipes adalog_w4a4 adalog_w4a4_fast] [--json FILE]
    python benchmarks/calibration_cost.py deit [--images 32] [--repeats 3] [--recipes adalog_w4a4 adalog_w4a4_fast] [--json FILE]

swin: the backbone of a stock Mask R-CNN Swin-T with random weights, noise of 800x1216:
only the cost is measured. deit: the real DeiT-Tiny with its classifier on ImageNet
images of 224x224. One image is a call. The unit is a float pass over the images: after
each calibrated block some of them pass through the float model, and the median of these
times, per image, counts for all. Of several repeats each block's median counts, so that
a machine that stalls once does not decide.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

import torch
from common import parser, report
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.calibration import BlockResult, Call, calibrate
from mmptq.engine.calibration import check_memory
from mmptq.engine.data import load_config
from mmptq.engine.memory import Peak
from mmptq.engine.progress import BlockProgress

CONFIG = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
SIZE = (800, 1216)


def swin(count: int) -> tuple[nn.Module, list[Tensor]]:
    """The backbone and its inputs."""
    init_default_scope('mmdet')
    cfg = load_config(CONFIG).model.backbone
    torch.manual_seed(0)
    backbone = MMENGINE_MODELS.build({**cfg, 'init_cfg': None})
    backbone.init_weights()
    backbone.eval()
    generator = torch.Generator().manual_seed(0)
    return backbone, [
        torch.randn(1, 3, *SIZE, generator=generator) for _ in range(count)
    ]


def deit(count: int) -> tuple[nn.Module, list[Tensor]]:
    """The classifier and its inputs."""
    from imagenet_top1 import DATA, MODELS, SHORTER_SIDE, listed, read

    images = [
        read(path, SHORTER_SIDE)[None]
        for path, _ in listed(DATA / 'imagenet' / 'calib.txt')[:count]
    ]
    return MODELS['deit_tiny'].load(DATA), [
        MODELS['deit_tiny'].normalized(image) for image in images
    ]


@torch.no_grad()
def seconds_an_image(model: nn.Module, images: list[Tensor]) -> float:
    """Of a float pass."""
    started = time.perf_counter()
    for image in images:
        model(image)
    return (time.perf_counter() - started) / len(images)


def calibration(
    model: nn.Module, images: list[Tensor], recipe: Recipe, plain: nn.Module
) -> tuple[dict[str, float], float]:
    """Seconds of each block of a calibration, and of a float pass of ``plain`` over all
    images.
    """
    spec = find_spec(model)
    convert(model, spec, recipe)
    names = spec.block_names(model)
    blocks: dict[str, float] = {}
    few = images[: max(1, len(images) // 8)]
    seconds_an_image(plain, few)  # the first time is slower
    passes: list[float] = []
    started = 0.0
    with BlockProgress(len(names), logging.getLogger()) as progress:

        def on_block(result: BlockResult) -> None:
            nonlocal started
            blocks[result.name] = time.perf_counter() - started
            progress.advance(result)
            passes.append(seconds_an_image(plain, few))
            started = time.perf_counter()

        started = time.perf_counter()
        calibrate(
            model,
            names,
            [Call((image,)) for image in images],
            recipe.build_method(),
            on_calls=check_memory,
            on_block=on_block,
        )
    return blocks, statistics.median(passes) * len(images)


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('model', choices=['swin', 'deit'])
    args.add_argument('--images', type=int, default=32)
    args.add_argument(
        '--repeats',
        type=int,
        default=1,
        help='of each calibration; the median of each block counts',
    )
    args.add_argument(
        '--recipes', nargs='+', default=['adalog_w4a4', 'adalog_w4a4_fast']
    )
    options = args.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    rows: list[dict[str, Any]] = []
    blocks: dict[str, dict[str, float]] = {}
    build = {'swin': swin, 'deit': deit}[options.model]
    for name in options.recipes:
        runs = []
        for _ in range(options.repeats):
            model, images = build(options.images)
            peak = Peak(torch.device('cpu'))
            runs.append(
                calibration(
                    model, images, Recipe.from_dict(load_recipe(name)), build(0)[0]
                )
            )
        blocks[name] = {
            block: statistics.median(seconds[block] for seconds, _ in runs)
            for block in runs[0][0]
        }
        unit = statistics.median(unit for _, unit in runs)
        seconds = sum(blocks[name].values())
        rows.append(
            {
                'recipe': name,
                'seconds': seconds,
                'float pass, s': unit,
                'float passes': seconds / unit,
                'slowest block, float passes': max(blocks[name].values()) / unit,
                'peak memory, MiB': peak.mib(),
            }
        )
        logging.info(rows[-1])
    recipes = {
        name: {key: load_recipe(name)[key] for key in ('bits', 'method')}
        for name in options.recipes
    }
    scope = (
        'backbone'
        if options.model == 'swin'
        else 'whole model (backbone and classifier head)'
    )
    about = dict(
        model=CONFIG if options.model == 'swin' else 'deit_tiny_patch16_224',
        scope=scope,
        images=options.images,
        repeats=options.repeats,
        size=SIZE if options.model == 'swin' else (224, 224),
        data='noise' if options.model == 'swin' else 'ImageNet',
        recipes=recipes,
        blocks_seconds=blocks,
    )
    report(
        f'cost of a calibration: {options.model}, {options.images} images, scope'
        f' {scope}',
        rows,
        about,
        options.json,
    )


if __name__ == '__main__':
    main()
