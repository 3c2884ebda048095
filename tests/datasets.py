"""The layouts of COCO and ADE20K, as mmdet's and mmsegmentation's stock configs read
them, with the demo's scenes in them.

What is odd in the real sets is odd here too: images of no object, a crowd, masks of
several parts, grey images, category ids with gaps, image ids that are no numbers from
zero; palettes, pixels of no class, most classes absent.
"""

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / 'demo'))
from generate_data import TEXTURES, Scene, Thing, annotation, draw_scene

COCO_IDS = tuple(
    number
    for number in range(1, 91)
    if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
)
COCO_LABELS = (0, 41, 79)
"""Of the demo's three kinds of objects: person, cup, toothbrush."""
ADE_LABELS = (0, 11, 12, 43, 76, 99, 100, 131, 149)
"""Of the demo's nine classes."""
EMPTY, CROWDED, GREY = 1, 2, 3
"""Images, by number, of a COCO set: without objects; with a crowd; grey."""
UNLABELLED, PALETTE = 1, 2
"""Images, by number, of an ADE20K set: without labels; with a palette."""


def write_coco(root: Path, train: int = 7, val: int = 6) -> Path:
    """Writes a set of instances in the layout of COCO 2017; returns its root."""
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO['classes']
    categories = [
        dict(id=category, name=name, supercategory='thing')
        for category, name in zip(COCO_IDS, names, strict=True)
    ]
    (root / 'annotations').mkdir(parents=True)
    for seed, (split, count) in enumerate(dict(train2017=train, val2017=val).items()):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            scene, number = (
                draw_scene(np.random.default_rng([20, seed, i])),
                139 + 1000 * seed + 146 * i,
            )
            name, (height, width) = f'{number:012}.jpg', scene.index_map.shape
            cv2.imwrite(
                str(root / split / name),
                (
                    cv2.cvtColor(scene.image, cv2.COLOR_BGR2GRAY)
                    if i == GREY
                    else scene.image
                ),
            )
            images.append(
                dict(id=number, file_name=name, height=height, width=width, license=1)
            )
            for found in [] if i == EMPTY else objects(scene, i == CROWDED):
                annotations.append(
                    dict(found, id=908800 + len(annotations), image_id=number)
                )
        content = dict(
            info={},
            licenses=[],
            images=images,
            annotations=annotations,
            categories=categories,
        )
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(content)
        )
    return root


def objects(scene: Scene, crowd: bool) -> list[dict[str, Any]]:
    """Annotations of a scene: polygons, every other object in two parts, and perhaps
    all objects again as one crowd.
    """
    found = []
    for i, thing in enumerate(scene.things):
        mask = thing.mask.copy()
        middle = int(np.median(np.flatnonzero(mask.any(0))))
        mask[:, middle : middle + 2 * (i % 2)] = False  # as behind a pole
        contours, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        polygons = [
            contour.flatten().tolist() for contour in contours if len(contour) > 2
        ]
        found.append(
            dict(
                annotation(thing),
                category_id=COCO_IDS[COCO_LABELS[thing.label % len(TEXTURES)]],
                segmentation=polygons,
            )
        )
    if crowd:
        group = Thing(0, 0.0, np.any([thing.mask for thing in scene.things], 0))
        found.append(
            dict(annotation(group), category_id=COCO_IDS[COCO_LABELS[0]], iscrowd=1)
        )
    return found


def write_ade20k(root: Path, training: int = 6, validation: int = 5) -> Path:
    """Writes a set of index maps in the layout of ADEChallengeData2016; returns its
    root.
    """
    table = np.array([0, *(1 + label for label in ADE_LABELS)], dtype=np.uint8)
    for seed, (split, count) in enumerate(
        dict(training=training, validation=validation).items()
    ):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            scene = draw_scene(np.random.default_rng([150, seed, i]))
            name = f'ADE_{"train" if seed == 0 else "val"}_{1 + i:08}'
            cv2.imwrite(str(root / 'images' / split / f'{name}.jpg'), scene.image)
            labels = Image.fromarray(table[scene.index_map] * (i != UNLABELLED))
            if i == PALETTE:
                labels.putpalette(
                    np.random.default_rng(0)
                    .integers(256, size=768, dtype=np.uint8)
                    .tobytes()
                )
            labels.save(root / 'annotations' / split / f'{name}.png')
    return root
