"""Progress of a calibration on disk, so that a killed run can go on."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from ..backbones import ConversionReport
from ..calibration import BlockResult
from ..errors import QuantizationError
from ..version import __version__
from .checkpoint import read_file, save_atomically
from .data import CalibrationSet


def fingerprint(model: nn.Module, report: ConversionReport, images: CalibrationSet, seed: int) -> str:
    """What a run's progress depends on, as a hash: weights, recipe, scope, images, seed and version."""
    digest = hashlib.sha256(json.dumps([report.recipe.to_dict(), report.scope, images.paths, seed, __version__]).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_progress(path: Path, identity: str, results: list[BlockResult]) -> None:
    """Writes the results of the blocks calibrated so far."""
    save_atomically({'identity': identity, 'blocks': [vars(result) for result in results]}, path)


def load_progress(path: Path, identity: str) -> dict[str, BlockResult]:
    """The blocks that an interrupted run calibrated, by name; none if there was no such run.

    Raises:
        QuantizationError: If that run had other weights, images or settings.
    """
    if not path.exists():
        return {}
    content = read_file(path)
    if not isinstance(content, dict) or content.get('identity') != identity:
        raise QuantizationError(f'{path} is of a run with another checkpoint, recipe, seed or other images; remove it, or do not --resume')
    return {block['name']: BlockResult(**block) for block in content['blocks']}
