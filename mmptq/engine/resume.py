"""Progress of a calibration on disk, so that a killed run can go on."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import ConversionReport
from ..calibration import BlockResult
from ..errors import QuantizationError
from ..version import __version__
from .checkpoint import read_file, save_atomically
from .data import CalibrationSet


def fingerprint(model: nn.Module, report: ConversionReport, images: CalibrationSet, seed: int) -> str:
    """What a run's progress depends on, as a hash: weights, recipe, scope, images, seed and version."""
    digest = hashlib.sha256(json.dumps([report.recipe.to_dict(), report.scope, images.paths, seed, __version__]).encode())
    _update(digest, model.state_dict())
    return digest.hexdigest()


def checksum(identity: str, blocks: list[dict[str, Any]]) -> str:
    """A hash of all that a progress file holds."""
    digest = hashlib.sha256(identity.encode())
    for block in blocks:
        digest.update(json.dumps([block['name'], block['sqnr_db']]).encode())
        _update(digest, block['params'])
    return digest.hexdigest()


def _update(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def save_progress(path: Path, identity: str, results: list[BlockResult]) -> None:
    """Writes the results of the blocks calibrated so far."""
    blocks = [vars(result) for result in results]
    save_atomically({'identity': identity, 'blocks': blocks, 'checksum': checksum(identity, blocks)}, path)


def load_progress(path: Path, identity: str) -> dict[str, BlockResult]:
    """The blocks that an interrupted run calibrated, by name; none if there was no such run.

    Raises:
        QuantizationError: If the file is damaged, or that run had other weights, images or settings.
    """
    if not path.exists():
        return {}
    try:
        content = read_file(path)
        intact = content['checksum'] == checksum(content['identity'], content['blocks'])
        done = {block['name']: BlockResult(**block) for block in content['blocks']}
    except Exception:  # a damaged file may hold anything
        intact = False
    if not intact:
        raise QuantizationError(f'{path} is damaged; remove it to calibrate from the start')
    if content['identity'] != identity:
        raise QuantizationError(f'{path} is of a run with another checkpoint, recipe, seed or other images; remove it, or do not --resume')
    return done
