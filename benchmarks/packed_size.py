"""Size of a packed checkpoint against its float32 file: the backbone of a stock Mask
R-CNN Swin-T, random weights.

    python benchmarks/packed_size.py [--recipes adalog_w4a4_fast uqvit_w4a4_fast minmax_w8a8] [--json FILE]

Both are safetensors files. Calibrated on one image of noise of 224x224: sizes do not
depend on it.
"""

from __future__ import annotations

import torch
from calibration_cost import swin
from common import parser, report
from safetensors.torch import save

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.calibration import Call, calibrate
from mmptq.checkpoints.packing import pack_state
from mmptq.engine.memory import MIB


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument(
        '--recipes',
        nargs='+',
        default=['adalog_w4a4_fast', 'uqvit_w4a4_fast', 'minmax_w8a8'],
    )
    options = args.parse_args()
    rows = []
    for name in options.recipes:
        backbone, _ = swin(0)
        size = len(save(backbone.state_dict()))
        spec, recipe = find_spec(backbone), Recipe.from_dict(load_recipe(name))
        convert(backbone, spec, recipe)
        calibrate(
            backbone,
            spec.block_names(backbone),
            [Call((torch.randn(1, 3, 224, 224),))],
            recipe.build_method(),
        )
        packed = len(save(pack_state(backbone)[0]))
        rows.append(
            {
                'recipe': name,
                'float32, MiB': size / MIB,
                'packed, MiB': packed / MIB,
                'ratio': packed / size,
            }
        )
    about = dict(
        scope='backbone',
        bits={name: load_recipe(name)['bits'] for name in options.recipes},
        calibration='one image of noise',
    )
    report('packed checkpoint, Swin-T backbone', rows, about, options.json)


if __name__ == '__main__':
    main()
