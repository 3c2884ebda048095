"""The fast search of UQ-ViT's alphas beside the full one: the error of each block's
output with what they chose, and the time.

    python benchmarks/alpha_search.py [--recipe uqvit_w4a4] [--images 32] [--json FILE]

The real DeiT-Tiny on ImageNet images. Both search every block on the same inputs, those
from the blocks that the full search calibrated before; the error is against the float
model's output, over all tokens of all images.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from calibration_cost import deit
from common import parser, report

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.calibration import Block, Call, Stream
from mmptq.calibration.blockwise import calibrate_block
from mmptq.calibration.capture import operations
from mmptq.quantizers import calibrated_parts


def searched(block: Block, recipe: Recipe) -> tuple[float, float, list[Any], list[Any]]:
    """The relative squared error of a block after its calibration, the seconds, its
    outputs, and those of the float model.
    """
    for op in block.ops.values():
        for part in calibrated_parts(op).values():
            part.clear()
    started = time.perf_counter()
    targets: list[Any] = calibrate_block(block, recipe.build_method())[1]
    seconds = time.perf_counter() - started
    outputs = block.run()
    error = sum(
        float((a - b).square().sum(dtype=torch.float64))
        for a, b in zip(outputs, targets, strict=True)
    )
    return (
        error / sum(float(b.square().sum(dtype=torch.float64)) for b in targets),
        seconds,
        outputs,
        targets,
    )


def main() -> None:
    """Runs the comparison."""
    arguments = parser(__doc__)
    arguments.add_argument('--recipe', default='uqvit_w4a4')
    arguments.add_argument('--images', type=int, default=32)
    args = arguments.parse_args()
    model, images = deit(args.images)
    full, fast = (
        Recipe.from_dict(load_recipe(name))
        for name in (args.recipe, f'{args.recipe}_fast')
    )
    spec = find_spec(model)
    convert(model, spec, full)
    calls = [Call((image,)) for image in images]
    names = spec.block_names(model)
    floats, prefix = (Stream(model, names, calls) for _ in range(2))
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        unit = model.get_submodule(name)
        block = Block(
            name,
            unit,
            prefix.calls(),
            operations(unit, f'{name}.'),
            number,
            floats.calls(),
        )
        fast_error, fast_seconds, *_ = searched(block, fast)
        error, seconds, outputs, targets = searched(block, full)
        rows.append(
            {
                'block': name,
                'relative error': error,
                'seconds': seconds,
                'fast seconds': fast_seconds,
                'fast / full': fast_error / error if error else 1.0,
            }
        )
        print(rows[-1], flush=True)
        floats.advance(targets)
        prefix.advance(outputs)
    ratios = [row['fast / full'] for row in rows]
    report(
        'search of alphas, fast beside full',
        rows,
        dict(
            recipe=args.recipe,
            scope='whole model (backbone and classifier head)',
            images=args.images,
            data='ImageNet',
            mean_ratio=sum(ratios) / len(ratios),
            largest_ratio=max(ratios),
        ),
        args.json,
    )
    print(
        f'fast / full: mean {sum(ratios) / len(ratios):.4f}, largest {max(ratios):.4f}'
    )


if __name__ == '__main__':
    main()
