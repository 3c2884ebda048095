"""The demo's data set: textured objects that hide one another on cluttered ground,
drawn from a seed.

One set of images in two formats, so that detectors and segmentors share it::

    OUT/train/*.jpg                 OUT/val/*.jpg
    OUT/annotations/instances_train.json, instances_val.json     COCO instances
    OUT/annotations_seg/train/*.png, val/*.png                   ADE20K: 0 is unlabelled, classes count from 1

A segmentor tells objects by shape and texture, a detector by texture alone; colour,
size, angle and light say nothing. Masks hold what is visible. They are run-length
encoded, which is exact, but which mmdet reads with ``poly2mask=True`` (its default)
only.

Usage: python demo/generate_data.py [--out demo/data] [--seed 0] [--train 800] [--val
    100]
"""

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

VERSION = 2
SHAPES = ('disc', 'box')
TEXTURES = ('striped', 'checked', 'dotted')
OBJECTS = tuple(f'{texture}_{shape}' for shape in SHAPES for texture in TEXTURES)
GROUNDS = ('clouds', 'grain', 'waves')
CLASSES = OBJECTS + GROUNDS

SIZES = (138, 206)  # of either side, in pixels
RADII = (20.0, 40.0)
COUNTS = (3, 7)  # objects tried per image
VISIBLE = 0.45  # of its area an object must show, else what hides it is not drawn

FloatArray = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Thing:
    """One object: its index in `OBJECTS`, its area without occlusion, and the mask of
    what is visible of it.
    """

    label: int
    area: float
    mask: Mask

    def behind(self, front: Mask) -> 'Thing':
        """This object once `front` is drawn over it."""
        return Thing(self.label, self.area, self.mask & ~front)

    @property
    def visible_enough(self) -> bool:
        """Whether this object may stand in the image."""
        return bool(self.mask.sum() >= VISIBLE * self.area)


@dataclass(frozen=True)
class Scene:
    """An image (BGR), its objects and its index map of `CLASSES`, in which 0 is
    unlabelled.
    """

    image: NDArray[np.uint8]
    things: list[Thing]
    index_map: NDArray[np.uint8]


def outline(shape: str, rng: np.random.Generator) -> FloatArray:
    """Corners (n, 2) of a shape of radius about 1, at a random angle and aspect."""
    corners = {'disc': 32, 'box': 4}[shape]
    angles = 2 * np.pi * np.arange(corners) / corners + np.pi / 4
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points[:, 1] *= rng.uniform(0.65, 1.0)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (points @ rotation.T).astype(np.float32)


def smooth_noise(
    height: int, width: int, sigma: float, rng: np.random.Generator
) -> FloatArray:
    """Blurred noise of standard deviation 1."""
    noise = cv2.GaussianBlur(
        rng.standard_normal((height, width), dtype=np.float32), (0, 0), sigma
    )
    return np.asarray(noise / noise.std(), dtype=np.float32)


def texture(kind: str, height: int, width: int, rng: np.random.Generator) -> FloatArray:
    """Pattern (height, width), about -1 to 1, of a kind of object or of ground."""
    if kind == 'clouds':
        return 0.6 * smooth_noise(height, width, 7.0, rng)
    if kind == 'grain':
        return 0.6 * smooth_noise(height, width, 1.2, rng)
    turn, period = (
        rng.uniform(0, 2 * math.pi),
        (rng.uniform(14.0, 22.0) if kind == 'waves' else rng.uniform(7.0, 12.0)),
    )
    cosine, sine = (
        2 * math.pi / period * math.cos(turn),
        2 * math.pi / period * math.sin(turn),
    )
    y, x = (
        np.arange(height, dtype=np.float32)[:, None],
        np.arange(width, dtype=np.float32)[None, :],
    )
    u = cosine * x + sine * y + rng.uniform(0, 2 * math.pi)
    if kind == 'waves':
        return np.sin(u + smooth_noise(height, width, 9.0, rng))
    v = cosine * y - sine * x + rng.uniform(0, 2 * math.pi)
    if kind == 'striped':
        wave = np.sin(u)
    elif kind == 'checked':
        wave = np.sin(u) * np.sin(v)
    else:
        wave = np.sin(u) + np.sin(v) - 0.6
    return np.tanh(4 * wave)


def colour(pattern: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Image (height, width, 3) of a pattern between two random colours, with a gradient
    of light.
    """
    height, width = pattern.shape
    base = rng.uniform(70, 185, size=3).astype(np.float32)
    swing = (rng.uniform(24, 48) + rng.uniform(-16, 16, size=3)).astype(np.float32)
    slope = rng.uniform(-0.25, 0.25, size=2).astype(np.float32)
    y, x = (
        np.arange(height, dtype=np.float32)[:, None],
        np.arange(width, dtype=np.float32)[None, :],
    )
    light = slope[0] * (y - height / 2) + slope[1] * (x - width / 2)
    return cv2.merge([base[i] + swing[i] * pattern + light for i in range(3)])


def draw_ground(
    height: int, width: int, rng: np.random.Generator
) -> tuple[FloatArray, NDArray[np.uint8]]:
    """Two kinds of ground along a curved border, under strokes that belong to no class;
    and their index map.
    """
    first, second = rng.permutation(len(GROUNDS))[:2]
    border = smooth_noise(height, width, 28.0, rng) > 0
    image = np.where(
        border[..., None],
        colour(texture(GROUNDS[first], height, width, rng), rng),
        colour(texture(GROUNDS[second], height, width, rng), rng),
    )
    index_map = (1 + len(OBJECTS) + np.where(border, first, second)).astype(np.uint8)
    for _ in range(rng.integers(3, 8)):
        start = rng.uniform((0, 0), (width, height))
        points = (start + np.cumsum(rng.normal(0, 14, size=(4, 2)), axis=0)).astype(
            np.int32
        )
        thickness = int(rng.integers(1, 4))
        cv2.polylines(
            image, [points], False, rng.uniform(30, 225, size=3).tolist(), thickness
        )
        cv2.polylines(index_map, [points], False, 0, thickness)
    return image, index_map


def draw_scene(rng: np.random.Generator) -> Scene:
    """One image, drawn from back to front."""
    height, width = (int(side) for side in rng.integers(*SIZES, size=2))
    image, index_map = draw_ground(height, width, rng)
    things: list[Thing] = []
    for _ in range(rng.integers(COUNTS[0], COUNTS[1] + 1)):
        label = int(rng.integers(len(OBJECTS)))
        shape, kind = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
        corners = rng.uniform(*RADII) * outline(shape, rng) + rng.uniform(
            (0, 0), (width, height)
        )
        corners = corners.round().astype(np.int32)
        canvas = np.zeros((height, width), dtype=np.uint8)
        mask = cv2.fillPoly(canvas, [corners], 1).astype(bool)
        drawn = [thing.behind(mask) for thing in things] + [
            Thing(label, cv2.contourArea(corners), mask)
        ]
        if not all(thing.visible_enough for thing in drawn):
            continue
        things = drawn
        image[mask] = colour(texture(kind, height, width, rng), rng)[mask]
        index_map[mask] = 1 + label
    noise = rng.uniform(4, 9) * rng.standard_normal(image.shape, dtype=np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 0.7) + noise
    return Scene(image.clip(0, 255).round().astype(np.uint8), things, index_map)


def run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed run-length encoding: column by column, beginning with zeros."""
    flat = mask.flatten(order='F')
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {'size': list(mask.shape), 'counts': [0, *counts] if flat[0] else counts}


def annotation(thing: Thing) -> dict[str, Any]:
    """COCO annotation of an object, without the ids that the file gives it."""
    rows, columns = (
        np.flatnonzero(thing.mask.any(axis=1)),
        np.flatnonzero(thing.mask.any(axis=0)),
    )
    x, y = int(columns[0]), int(rows[0])
    return {
        'category_id': 1 + thing.label % len(TEXTURES),
        'bbox': [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        'area': int(thing.mask.sum()),
        'segmentation': run_lengths(thing.mask),
        'iscrowd': 0,
    }


def write_split(folder: Path, split: str, number: int, seed: list[int]) -> None:
    """Draw and write one split. Image i depends on `seed` and i only, not on how many
    there are.
    """
    for parent in (split, f'annotations_seg/{split}', 'annotations'):
        (folder / parent).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(number):
        scene = draw_scene(np.random.default_rng([*seed, i]))
        height, width = scene.index_map.shape
        cv2.imwrite(
            str(folder / split / f'{i:04d}.jpg'),
            scene.image,
            [cv2.IMWRITE_JPEG_QUALITY, 95],
        )
        cv2.imwrite(
            str(folder / 'annotations_seg' / split / f'{i:04d}.png'), scene.index_map
        )
        images.append(
            {'id': i, 'file_name': f'{i:04d}.jpg', 'height': height, 'width': width}
        )
        for thing in scene.things:
            annotations.append(
                {'id': 1 + len(annotations), 'image_id': i, **annotation(thing)}
            )
    categories = [
        {'id': 1 + label, 'name': name} for label, name in enumerate(TEXTURES)
    ]
    coco = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def generate(out: Path, seed: int = 0, train: int = 800, val: int = 100) -> None:
    """Write the data set to `out`, at once by a rename; do nothing where the same set
    is there already.
    """
    marker = {'version': VERSION, 'seed': seed, 'train': train, 'val': val}
    if out.exists():
        if not (out / 'demo.json').is_file():
            raise FileExistsError(
                f'{out} exists and is no demo data set. Choose another folder, or'
                ' remove it.'
            )
        if json.loads((out / 'demo.json').read_text()) == marker:
            return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as scratch:
        fresh = Path(scratch) / 'fresh'
        write_split(fresh, 'train', train, [seed, 0])
        write_split(fresh, 'val', val, [seed, 1])
        (fresh / 'demo.json').write_text(json.dumps(marker))
        if out.exists():
            shutil.move(out, Path(scratch) / 'old')
        fresh.rename(out)


def main() -> None:
    """Writes the data set that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path(__file__).parent / 'data',
        help='folder to write (demo/data)',
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--train', type=int, default=800, help='number of training images'
    )
    parser.add_argument(
        '--val', type=int, default=100, help='number of validation images'
    )
    args = parser.parse_args()
    generate(args.out, args.seed, args.train, args.val)
    print(
        f'{args.out}: {args.train} train and {args.val} val images of seed {args.seed}'
    )


if __name__ == '__main__':
    main()
