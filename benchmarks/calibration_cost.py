"""Time and memory of calibrating a stock Mask R-CNN Swin-T with random weights at 800x1216.

    python benchmarks/calibration_cost.py [--images 32] [--recipe adalog_w4a4] [--json FILE]

The images are noise: only the cost is measured. The unit of time is one float pass of the backbone over the same images.
"""
from __future__ import annotations

import logging
import time

import torch
from common import parser, report
from mmengine.registry import MODELS, init_default_scope

from mmptq.apis import load_recipe
from mmptq.backbones import find_spec
from mmptq.calibration import Call, calibrate
from mmptq.engine.calibration import check_memory
from mmptq.engine.data import load_config
from mmptq.engine.memory import Peak
from mmptq.engine.progress import BlockProgress

CONFIG = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('--images', type=int, default=32)
    args.add_argument('--height', type=int, default=800)
    args.add_argument('--width', type=int, default=1216)
    args.add_argument('--recipe', default='adalog_w4a4')
    options = args.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    init_default_scope('mmdet')
    cfg = load_config(CONFIG)
    recipe = load_recipe(options.recipe)
    cfg.model.backbone = dict(type='mmptq.QuantBackbone', backbone={**cfg.model.backbone, 'init_cfg': None}, recipe=recipe)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, options.height, options.width, generator=generator) for _ in range(options.images)]
    peak = Peak(torch.device('cpu'))
    with torch.no_grad():
        model.backbone(images[0])
        started = time.perf_counter()
        for image in images:
            model.backbone(image)
    float_pass = time.perf_counter() - started
    float_peak, peak, started = peak.mib(), Peak(torch.device('cpu')), time.perf_counter()
    backbone = model.backbone
    names = find_spec(backbone).block_names(backbone)
    with BlockProgress(len(names), logging.getLogger()) as progress:
        calibrate(backbone, names, [Call((image,)) for image in images], backbone.quantization.recipe.build_method(),
                  on_calls=check_memory, on_block=progress.advance)
    seconds = time.perf_counter() - started
    rows = [dict(stage='float pass', seconds=float_pass, passes=1.0, peak_memory_mib=float_peak),
            dict(stage='calibration', seconds=seconds, passes=seconds / float_pass, peak_memory_mib=peak.mib())]
    about = dict(config=CONFIG, weights='random', scope='backbone', recipe=options.recipe, bits=recipe['bits'], method=recipe['method'],
                 images=options.images, size=[options.height, options.width], data='noise')
    size = f'{options.height}x{options.width}'
    title = f'calibration of Mask R-CNN Swin-T, {options.recipe}, {options.images} images of {size}, scope backbone'
    report(title, rows, about, options.json)


if __name__ == '__main__':
    main()
