"""Whether two commits calibrate to the same bits: a hash of every tensor of
quantized.pth, for every recipe at W4A4.

    git worktree add OLD COMMIT
    PYTHONPATH=OLD python benchmarks/same_states.py --json old.json
    python benchmarks/same_states.py --json new.json --against old.json

The models are the bundled detector and segmentor and a small ViT with random weights,
calibrated on 4 images (scope ``backbone``, 2 CPU threads). Sums round otherwise on
another processor, so both sides are to be run on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'demo'))

VIT = dict(
    type='mmseg.VisionTransformer', img_size=(128, 128), patch_size=16, embed_dims=48, num_layers=3, num_heads=3,
    mlp_ratio=2, out_indices=(2,), final_norm=True, patch_bias=True,
)  # fmt: skip
HEAD = dict(
    type='FCNHead', in_channels=48, channels=16, in_index=0, num_convs=1, num_classes=8, norm_cfg=dict(type='BN'),
    loss_decode=dict(type='CrossEntropyLoss'),
)  # fmt: skip


def bundled(name: str) -> tuple[str, str]:
    """Config and checkpoint of a bundled model."""
    return str(ROOT / 'configs' / 'demo' / f'{name}.py'), str(
        ROOT / 'demo' / f'{name}.pth'
    )


def random_vit(folder: Path) -> tuple[str, str]:
    """Config and checkpoint of a small ViT with random weights in a segmentor."""
    cfg = Config.fromfile(bundled('upernet_swin-demo')[0])
    cfg.model = dict(
        type='EncoderDecoder',
        data_preprocessor=cfg.model.data_preprocessor,
        backbone=VIT,
        decode_head=HEAD,
        test_cfg=dict(mode='whole'),
    )
    cfg.dump(folder / 'vit.py')
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(
            torch.randn(parameter.shape, generator=generator), alpha=0.05
        )
    torch.save({'state_dict': model.state_dict()}, folder / 'vit.pth')
    return str(folder / 'vit.py'), str(folder / 'vit.pth')


def hashes(path: Path) -> dict[str, str]:
    """A hash of each tensor of a checkpoint."""
    state = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
    return {
        name: (
            hashlib.sha256(
                value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            ).hexdigest()[:16]
        )
        for name, value in state.items()
    }


def recipe_of(name: str) -> dict[str, Any]:
    """A recipe at W4A4; of one with gradient descent a few steps."""
    from mmptq.apis import load_recipe

    method, _, variant = name.partition('_')
    recipe: dict[str, Any] = load_recipe(
        f'{method}_w4a4' + (f'_{variant}' if variant else '')
    )
    for stage in [recipe['method']] if 'method' in recipe else recipe['stages']:
        if 'BRECQ' in stage['type']:
            stage.update(iterations=5, batch=2)
    return recipe


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--json', type=Path, required=True, help='file for the hashes')
    parser.add_argument(
        '--against', type=Path, help='hashes of another commit, to compare with'
    )
    parser.add_argument('--recipes', nargs='+', help='by default all')
    parser.add_argument('--models', nargs='+', default=['detector', 'segmentor', 'vit'])
    args = parser.parse_args()

    from generate_data import generate

    from mmptq.apis import quantize, recipe_names

    generate(ROOT / 'demo' / 'data')
    torch.set_num_threads(2)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            'detector': bundled('mask-rcnn_swin-demo'),
            'segmentor': bundled('upernet_swin-demo'),
            'vit': random_vit(Path(folder)),
        }
        for model in args.models:
            for recipe in args.recipes or recipe_names():
                begin = time.perf_counter()
                work_dir = Path(folder) / f'{model}_{recipe}'
                config, checkpoint = models[model]
                quantize(
                    config,
                    checkpoint,
                    recipe_of(recipe),
                    work_dir=str(work_dir),
                    calib_images=4,
                    evaluate=False,
                )
                found[f'{model} {recipe}'] = hashes(work_dir / 'quantized.pth')
                print(
                    f'{model} {recipe}: {time.perf_counter() - begin:.1f} s', flush=True
                )
                args.json.write_text(json.dumps(found, indent=1) + '\n')
    if args.against:
        sys.exit(compare(found, json.loads(args.against.read_text())))


def compare(found: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> int:
    """Prints what differs; returns how many runs do."""
    different = 0
    for run, tensors in found.items():
        before = other.get(run, {})
        names = sorted(
            name
            for name in tensors.keys() | before.keys()
            if tensors.get(name) != before.get(name)
        )
        different += bool(names)
        print(
            f'{run}: '
            + (
                f'{len(names)} tensors differ, first {names[0]}'
                if names
                else f'{len(tensors)} tensors equal'
            )
        )
    return different


if __name__ == '__main__':
    main()
