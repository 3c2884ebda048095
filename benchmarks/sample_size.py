"""What the size of the token sample does to the parameters that the search chooses, and
to the output error over all tokens.

Layers of the real DeiT-Tiny with their inputs on calibration images; W4A4, full search
setting, each size with several seeds. The error is over all tokens, in parts of that of
the largest sample; the spread is how far the input's scale lies from the median of all
seeds, root mean square, in percent.

    python benchmarks/sample_size.py --json benchmarks/results/sample_size.json
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from common import parser, report
from imagenet_top1 import DATA, MODELS, SHORTER_SIDE, listed, read
from layer_search import inputs, ours

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.layers import QuantLinear

LAYERS = (
    'blocks.3.attn.qkv',
    'blocks.6.attn.proj',
    'blocks.6.mlp.fc1',
    'blocks.9.mlp.fc2',
)
SIZES = (256, 1024, 4096, 10**6)


def searched(
    op: QuantLinear, calls: list[torch.Tensor], recipe: Recipe, seed: int
) -> tuple[float, float]:
    """Squared output error over all tokens, and the input's scale."""
    error, _ = ours(op, calls, recipe, seed)
    params = op.quantizer('input').params
    assert params is not None
    return error, float(params['scale'])


def main() -> None:
    """Runs the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument('--data', type=Path, default=DATA)
    arguments.add_argument('--recipe', default='adalog_w4a4')
    arguments.add_argument('--images', type=int, default=32)
    arguments.add_argument('--seeds', type=int, default=3)
    args = arguments.parse_args()
    classifier = MODELS['deit_tiny']
    model = classifier.load(args.data)
    recipes = {}
    for size in SIZES:
        raw = load_recipe(args.recipe)
        raw['method'].update(rows=size, screen=min(size, 256))
        recipes[size] = Recipe.from_dict(raw)
    convert(model, find_spec(model), recipes[SIZES[0]])
    files = listed(args.data / 'imagenet' / 'calib.txt')[: args.images]
    images = classifier.normalized(
        torch.stack([read(path, SHORTER_SIDE) for path, _ in files])
    )
    rows: list[dict[str, Any]] = []
    for name in LAYERS:
        op = model.get_submodule(name)
        assert isinstance(op, QuantLinear)
        calls = inputs(model, op, images)
        tokens = sum(x.shape[-2] for x in calls)
        found = {
            size: [searched(op, calls, recipe, seed) for seed in range(args.seeds)]
            for size, recipe in recipes.items()
        }
        unit = statistics.mean(error for error, _ in found[SIZES[-1]])
        middle = statistics.median(
            scale for pairs in found.values() for _, scale in pairs
        )
        for size, pairs in found.items():
            spread = (
                statistics.mean((scale / middle - 1) ** 2 for _, scale in pairs) ** 0.5
            )
            rows.append(
                {
                    'layer': name,
                    'rows': min(size, tokens),
                    'error': statistics.mean(error for error, _ in pairs) / unit,
                    'largest error': max(error for error, _ in pairs) / unit,
                    'spread of the scale, %': 100 * spread,
                }
            )
    report(
        f'size of the token sample, {args.recipe}',
        rows,
        dict(
            recipe=args.recipe,
            scope='one layer',
            images=args.images,
            data='ImageNet',
            model='deit_tiny',
            seeds=args.seeds,
        ),
        args.json,
    )


if __name__ == '__main__':
    main()
