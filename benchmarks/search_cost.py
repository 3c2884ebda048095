"""How the search of one layer grows with tokens, width and candidates: a table and a
plot.

    python benchmarks/search_cost.py [--plot docs/search_cost.png] [--json FILE]

Random 192 -> 576 layers (or as wide as said), inputs of images of 197 tokens, W4A4.
"weights, given the sums" is the exact search of the weights over all tokens, from their
Gram matrices.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from common import parser, report
from torch import nn

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe
from mmptq.calibration import FPCS, Block, Call, run_stages, search_weight
from mmptq.layers import QuantLinear

TOKENS, IN, OUT, IMAGES, CANDIDATES = 197, 192, 576, 32, 128
SWEEPS = {
    'images': (4, 8, 16, 32, 64, 128),
    'inputs': (96, 192, 384, 768),
    'outputs': (144, 288, 576, 1152),
    'candidates': (32, 64, 128, 256),
}


def measure(
    images: int = IMAGES,
    inputs: int = IN,
    outputs: int = OUT,
    candidates: int = CANDIDATES,
) -> dict[str, float]:
    """Seconds of the stages of one layer's calibration."""
    torch.manual_seed(0)
    recipe = load_recipe('adalog_w4a4')
    recipe['method'].update(candidates=candidates)
    checked = Recipe.from_dict(recipe)
    op = QuantLinear.from_float(nn.Linear(inputs, outputs))
    checked.equip(op, {'input': 'post_norm', 'weight': 'weight'})
    calls = [Call((torch.randn(1, TOKENS, inputs),)) for _ in range(images)]
    block = Block('layer', op, calls, {'layer': op})
    method: Any = checked.build_method()
    started = time.perf_counter()
    run_stages(block, method)
    whole = time.perf_counter() - started
    started = time.perf_counter()
    gram = block.grams()['layer']
    sums = time.perf_counter() - started
    started = time.perf_counter()
    search_weight(
        op,
        gram,
        block.samples['layer'],
        FPCS(method.steps, method.width, method.candidates, method.rank, method.screen),
    )
    return {
        'whole layer, s': whole,
        'sums over tokens, s': sums,
        'weights, given the sums, s': time.perf_counter() - started,
    }


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('--plot', type=Path, help='file for the plot')
    options = args.parse_args()
    measure(images=2)
    rows = [
        {'sweep': sweep, 'value': value, **measure(**{sweep: value})}
        for sweep, values in SWEEPS.items()
        for value in values
    ]
    report(
        "cost of one layer's search (192 -> 576, 32 images of 197 tokens, 128"
        ' candidates where not said)',
        rows,
        dict(
            recipe='adalog_w4a4',
            scope='one layer',
            bits=dict(weight=4, activation=4),
            data='random',
        ),
        options.json,
    )
    if options.plot:
        draw(rows, options.plot)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a sweep."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(SWEEPS), figsize=(4 * len(SWEEPS), 3.2), sharey=True
    )
    for panel, (sweep, values) in zip(panels, SWEEPS.items(), strict=True):
        for stage in list(rows[0])[2:]:
            panel.plot(
                values,
                [row[stage] for row in rows if row['sweep'] == sweep],
                marker='o',
                label=stage.removesuffix(', s'),
            )
        panel.set_xlabel(sweep)
        panel.set_xscale('log', base=2)
        panel.set_yscale('log', base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('seconds')
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == '__main__':
    main()
