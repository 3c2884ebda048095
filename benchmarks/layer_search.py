"""Our layer search beside a brute-force one that follows the paper literally: the
output error reached, and the time.

Layers of the real DeiT-Tiny, with their inputs on calibration images; W4A4, full search
setting, timed on all images. The brute force, which scores every candidate on every
token, gets ``--reference-images``. The fast recipe is compared with the full one on all
images.

    python benchmarks/layer_search.py --json benchmarks/results/layer_search.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from brute_force import linear_error, search_gelu_linear, search_linear, search_reparam
from common import parser, report
from imagenet_top1 import DATA, MODELS, SHORTER_SIDE, listed, read
from torch import Tensor

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.calibration import Block, Call, operations, run_stages
from mmptq.calibration.capture import listening
from mmptq.layers import QuantLinear, QuantOp

LAYERS = ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')


def inputs(model: torch.nn.Module, op: QuantLinear, images: Tensor) -> list[Tensor]:
    """The layer's inputs in the float model, (1, tokens, in) for each image."""
    found: list[Tensor] = []

    def keep(name: str, op: QuantOp, activations: tuple[Tensor, ...]) -> None:
        found.append(activations[0].clone())

    whole = Block('model', model, [], operations(model))
    with torch.no_grad(), whole.as_float(), listening({'layer': op}, keep):
        for image in images:
            model(image[None])
    return found


def ours(
    op: QuantLinear, calls: list[Tensor], recipe: Recipe, seed: int = 0
) -> tuple[float, float]:
    """Squared output error over all tokens, and seconds."""
    for quantizer in (*op.quantizers().values(), *([op.rescale] if op.rescale else [])):
        quantizer.clear()
    started = time.perf_counter()
    run_stages(
        Block('layer', op, [Call((x,)) for x in calls], {'layer': op}, seed),
        recipe.build_method(),
    )
    seconds = time.perf_counter() - started
    with torch.no_grad():
        errors = [
            float((op(x) - op.float_forward(x)).square().sum(dtype=torch.float64))
            for x in calls
        ]
    return sum(errors), seconds


def reference(op: QuantLinear, calls: list[Tensor], site: str) -> tuple[float, float]:
    """The same by brute force."""
    x, weight = torch.cat([call[0] for call in calls]), op.weight.detach()
    started = time.perf_counter()
    if site == 'post_gelu':
        error = search_gelu_linear(x, weight, 4, 4)[2]
    else:
        r, b = (
            search_reparam(x, 4)
            if site == 'post_norm'
            else (torch.ones_like(x[0]), torch.zeros_like(x[0]))
        )
        error = search_linear(x / r - b, weight * r, 4, 4)[2]
    return error, time.perf_counter() - started


def main() -> None:
    """Runs the comparison."""
    arguments = parser(__doc__)
    arguments.add_argument('--data', type=Path, default=DATA)
    arguments.add_argument('--recipe', default='adalog_w4a4')
    arguments.add_argument('--images', type=int, default=32)
    arguments.add_argument('--reference-images', type=int, default=4)
    arguments.add_argument('--layers', type=int, default=12)
    arguments.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    classifier = MODELS['deit_tiny']
    model = classifier.load(args.data)
    recipe, fast = (
        Recipe.from_dict(load_recipe(name))
        for name in (args.recipe, f'{args.recipe}_fast')
    )
    convert(model, find_spec(model), recipe)
    files = listed(args.data / 'imagenet' / 'calib.txt')[: args.images]
    images = classifier.normalized(
        torch.stack([read(path, SHORTER_SIDE) for path, _ in files])
    )
    rows: list[dict[str, Any]] = []
    for number in range(args.layers):
        name = f'blocks.{number}.{LAYERS[number % len(LAYERS)]}'
        op = model.get_submodule(name)
        assert isinstance(op, QuantLinear)
        calls = inputs(model, op, images)
        error, seconds = ours(op, calls, recipe)
        fast_error, fast_seconds = ours(op, calls, fast)
        few = calls[: args.reference_images]
        few_error, few_seconds = ours(op, few, recipe)
        reference_error, reference_seconds = reference(op, few, op.sites['input'])
        rows.append(
            {
                'layer': name,
                'shape': f'{op.in_features} -> {op.out_features}',
                'seconds': seconds,
                'relative error': error / energy(op, calls),
                'fast seconds': fast_seconds,
                'fast / full': fast_error / error,
                'images': len(few),
                'our seconds': few_seconds,
                'brute-force seconds': reference_seconds,
                'error ratio': few_error / reference_error,
            }
        )
        print(rows[-1], flush=True)
    ratios, fast_ratios = (
        [row[column] for row in rows] for column in ('error ratio', 'fast / full')
    )
    report(
        'layer search, ours beside brute force',
        rows,
        dict(
            recipe=args.recipe,
            scope='one layer',
            images=args.images,
            reference_images=args.reference_images,
            mean_ratio=sum(ratios) / len(ratios),
            largest_ratio=max(ratios),
            mean_fast_ratio=sum(fast_ratios) / len(rows),
        ),
        args.json,
    )
    print(
        f'error ratio: mean {sum(ratios) / len(ratios):.4f}, largest {max(ratios):.4f};'
        f' fast / full: {sum(fast_ratios) / len(rows):.4f}'
    )


def energy(op: QuantLinear, calls: list[Tensor]) -> float:
    """Squared float output without bias, over all tokens."""
    with torch.no_grad():
        return sum(
            linear_error(x[0], op.weight, torch.zeros_like(x[0]), op.weight)
            for x in calls
        )


if __name__ == '__main__':
    main()
