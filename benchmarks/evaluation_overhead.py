"""Time of the fake-quantized model against the float one, image by image in turn in one
run.

python benchmarks/evaluation_overhead.py CONFIG CHECKPOINT [--recipe adalog_w4a4] [--images 50] [--json FILE]
"""

from __future__ import annotations

import itertools
import tempfile
import time

import torch
from common import parser, report
from mmengine.runner import Runner

from mmptq.apis import quantize
from mmptq.checkpoints.reading import safe_loading
from mmptq.engine.data import load_config


def build(config: str, checkpoint: str, work_dir: str) -> Runner:
    """A Runner with a loaded model, ready to test."""
    cfg = load_config(config)
    cfg.work_dir, cfg.load_from = work_dir, checkpoint
    with safe_loading():
        runner = Runner.from_cfg(cfg)
        runner.load_or_resume()
    runner.model.eval()
    return runner


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('config')
    args.add_argument('checkpoint')
    args.add_argument('--recipe', default='adalog_w4a4')
    args.add_argument('--images', type=int, default=50)
    options = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = quantize(
            options.config,
            options.checkpoint,
            options.recipe,
            work_dir=folder,
            calib_images=2,
            evaluate=False,
        )
        sides = {
            'float': build(options.config, options.checkpoint, f'{folder}/float'),
            'fake quantized': build(
                f'{folder}/quantized.py', f'{folder}/quantized.pth', f'{folder}/again'
            ),
        }
        batches = list(itertools.islice(sides['float'].test_dataloader, options.images))
        seconds = dict.fromkeys(sides, 0.0)
        with torch.no_grad():
            for number, batch in enumerate([*batches[:2], *batches]):
                for name, runner in sides.items():
                    started = time.perf_counter()
                    runner.model.test_step(batch)
                    seconds[name] += (time.perf_counter() - started) * (
                        number >= 2
                    )  # the first two warm up
    rows = [
        dict(side=name, seconds=value, ratio=value / seconds['float'])
        for name, value in seconds.items()
    ]
    about = dict(
        config=options.config.split('/')[-1],
        recipe=options.recipe,
        bits=summary['bits'],
        scope=summary['scope'],
        calibration=summary['calibration'],
        images=len(batches),
    )
    report(
        f'evaluation, {about["config"]}, {options.recipe}, scope {summary["scope"]}',
        rows,
        about,
        options.json,
    )


if __name__ == '__main__':
    main()
