"""Top-1 accuracy of several recipes on whole ImageNet classifiers: the same weights and
the same images for all.

    python benchmarks/imagenet_top1.py [--models deit_tiny vit_tiny] [--recipes minmax_w4a4 adalog_w4a4 ...] [--data DIR] [--json FILE]

DIR has the weights (weights/<timm's name>.safetensors), validation images of at least
224x224 (imagenet/val.txt, "path label" a line) and others to calibrate on
(imagenet/calib.txt).
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, report
from PIL import Image
from torch import Tensor, nn

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, convert, find_spec
from mmptq.backbones.timm_import import import_timm
from mmptq.calibration import Call, calibrate

RECIPES = [
    f'{method}_w{bits}a{bits}'
    for bits in (6, 4, 3)
    for method in ('minmax', 'log2', 'logsqrt2', 'adalog')
]
SCOPE = 'whole model (backbone and classifier head), patch-embedding input 8 bit'
DATA = Path(__file__).resolve().parents[2] / 'shared' / 'data'
CROP, SHORTER_SIDE, BATCH = 224, 256, 50


@dataclass(frozen=True)
class Classifier:
    """A model of timm's, and the mean and standard deviation of the images that it was
    trained on.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def load(self, data: Path) -> nn.Module:
        """The float model with its weights, strictly."""
        timm = import_timm()
        model: nn.Module = timm.create_model(self.name)
        timm.models.load_checkpoint(
            model, str(data / 'weights' / f'{self.name}.safetensors'), strict=True
        )
        return model.eval()

    def normalized(self, images: Tensor) -> Tensor:
        """The model's input of uint8 images (n, 3, height, width)."""
        return (images / 255 - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(
            self.std
        ).view(3, 1, 1)


MODELS = {
    'deit_tiny': Classifier(
        'deit_tiny_patch16_224', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
    'vit_tiny': Classifier('vit_tiny_patch16_224', (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def listed(file: Path) -> list[tuple[Path, int]]:
    """Paths and labels of a list of images."""
    lines = [line.rsplit(maxsplit=1) for line in file.read_text().splitlines()]
    return [(file.parent / path, int(label)) for path, label in lines]


def read(path: Path, shorter_side: int | None = None) -> Tensor:
    """The centre of an image, uint8 of shape (3, 224, 224), after it is resized if a
    shorter side is given.
    """
    with Image.open(path) as file:
        image = file.convert('RGB')
    if shorter_side and min(image.size) != shorter_side:
        ratio = shorter_side / min(image.size)
        image = image.resize(
            (round(image.width * ratio), round(image.height * ratio)),
            Image.Resampling.BICUBIC,
        )
    left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
    return torch.from_numpy(
        np.array(image.crop((left, top, left + CROP, top + CROP)))
    ).permute(2, 0, 1)


@torch.no_grad()
def right(
    model: nn.Module, classifier: Classifier, images: Tensor, labels: Tensor
) -> Tensor:
    """For each image 1 if the model's first guess is right, else 0."""
    guesses = [
        model(classifier.normalized(batch)).argmax(1) for batch in images.split(BATCH)
    ]
    return (torch.cat(guesses) == labels).double()


def quantized(
    classifier: Classifier, data: Path, recipe: Recipe, images: Tensor, seed: int
) -> tuple[nn.Module, float]:
    """The model, calibrated, and the seconds that this took."""
    model = classifier.load(data)
    spec = find_spec(model)
    skipped = convert(model, spec, recipe).skipped
    if skipped:
        raise SystemExit(
            f'{classifier.name}: the scope is the whole model, but these layers stay'
            f' float: {skipped}'
        )
    calls = [Call((classifier.normalized(image[None]),)) for image in images]
    started = time.perf_counter()
    calibrate(model, spec.block_names(model), calls, recipe.build_method(), seed=seed)
    return model, time.perf_counter() - started


def row(
    model: str,
    recipe: str,
    bits: str,
    result: Tensor,
    reference: Tensor,
    seconds: float,
) -> dict[str, Any]:
    """A row of the table; the standard error is that of the mean difference over the
    images.
    """
    difference = result - reference
    error = float(difference.std() / len(difference) ** 0.5)
    return {
        'model': model,
        'recipe': recipe,
        'bits W/A/softmax': bits,
        'top-1 %': 100 * float(result.mean()),
        'difference': 100 * float(difference.mean()),
        'standard error': 100 * error,
        'calibration s': seconds,
    }


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
    args.add_argument('--recipes', nargs='*', default=RECIPES)
    args.add_argument('--images', type=int, default=32, help='calibration images')
    args.add_argument(
        '--limit',
        type=int,
        help='validation images, the first of the list (default: all)',
    )
    args.add_argument('--seed', type=int, default=0)
    args.add_argument('--data', type=Path, default=DATA)
    options = args.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    recipes = {name: Recipe.from_dict(load_recipe(name)) for name in options.recipes}
    validation = listed(options.data / 'imagenet' / 'val.txt')[: options.limit]
    drawn = random.Random(options.seed).sample(
        listed(options.data / 'imagenet' / 'calib.txt'), options.images
    )
    images, labels = (
        torch.stack([read(path) for path, _ in validation]),
        torch.tensor([label for _, label in validation]),
    )
    calibration = torch.stack([read(path, SHORTER_SIDE) for path, _ in drawn])
    rows = []
    for name in options.models:
        classifier = MODELS[name]
        reference = right(classifier.load(options.data), classifier, images, labels)
        rows.append(row(name, 'float', '32', reference, reference, 0.0))
        logging.info(rows[-1])
        for recipe_name, recipe in recipes.items():
            model, seconds = quantized(
                classifier, options.data, recipe, calibration, options.seed
            )
            bits = (
                f'{recipe.bits.weight}/{recipe.bits.activation}/{recipe.bits.softmax}'
            )
            rows.append(
                row(
                    name,
                    recipe_name,
                    bits,
                    right(model, classifier, images, labels),
                    reference,
                    seconds,
                )
            )
            logging.info(rows[-1])
    about = dict(
        scope=SCOPE,
        bits={name: recipe.to_dict()['bits'] for name, recipe in recipes.items()},
        weights={name: f'{MODELS[name].name}.safetensors' for name in options.models},
        timm=import_timm().__version__,
        calibration=dict(
            dataset='ImageNet sample images, one a class',
            images=options.images,
            seed=options.seed,
            leak=False,
            files=[path.name for path, _ in drawn],
        ),
        evaluation=dict(dataset='ILSVRC2012 val, centre crop', images=len(validation)),
    )
    report(
        f'ImageNet top-1, {len(validation)} images, {options.images} calibration'
        f' images, scope: {SCOPE}',
        rows,
        about,
        options.json,
    )


if __name__ == '__main__':
    main()
