"""Progress of a calibration on disk, so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import ConversionReport
from ..calibration import BlockResult
from ..errors import QuantizationError
from ..version import __version__
from .plain import plain
from .reading import checked_state, read_file
from .writing import save_atomically


def fingerprint(
    model: nn.Module, report: ConversionReport, images: Sequence[str], seed: int
) -> str:
    """What a run's progress depends on, as a hash: weights, recipe, scope, images, seed
    and version.
    """
    about = [report.recipe.to_dict(), report.scope, list(images), seed, __version__]
    digest = hashlib.sha256(json.dumps(about).encode())
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
        digest.update(
            value.detach()
            .cpu()
            .contiguous()
            .view(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )


def save_progress(path: Path, identity: str, results: list[BlockResult]) -> None:
    """Writes the results of the blocks calibrated so far."""
    blocks = [vars(result) for result in results]
    content = {
        'identity': identity,
        'blocks': blocks,
        'checksum': checksum(identity, blocks),
    }
    save_atomically(content, path)


def load_progress(path: Path, identity: str) -> dict[str, BlockResult]:
    """The blocks that an interrupted run calibrated, by name; none if there was no such
    run.

    That a file is whole and of this run says nothing of who wrote it: what it holds is
    checked against the model when it is set (:meth:`mmptq.calibration.Block.load`).

    Raises:
        QuantizationError: If the file is damaged, or that run had other weights, images
            or settings.
    """
    if not path.exists():
        return {}
    try:
        found, blocks = _blocks(path)
        known = found['identity'] == identity
        intact = found['checksum'] == checksum(found['identity'], blocks)
    except (QuantizationError, KeyError, TypeError, ValueError):
        known = intact = False
    if not intact:
        raise QuantizationError(
            f'{path} is damaged; remove it to calibrate from the start'
        )
    if not known:
        raise QuantizationError(
            f'{path} is of a run with another checkpoint, recipe, seed or other images;'
            ' remove it, or do not --resume'
        )
    return {block['name']: BlockResult(**block) for block in blocks}


def _blocks(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Identity and checksum of a progress file, and its blocks, each part of its type.

    Raises:
        QuantizationError, KeyError, TypeError, ValueError: If one is not.
    """
    content = read_file(path)
    if type(content) is not dict or set(content) != {'identity', 'blocks', 'checksum'}:
        raise ValueError('it has other keys')
    if type(content['blocks']) is not list:
        raise TypeError('its blocks are no list')
    about = plain({key: content[key] for key in ('identity', 'checksum')}, str(path))
    if not all(isinstance(text, str) for text in about.values()):
        raise TypeError('its hashes are no text')
    blocks = [_block(block, path) for block in content['blocks']]
    tensors = [value for block in blocks for value in block['params'].values()]
    if (
        sum(value.numel() * value.element_size() for value in tensors)
        > 2 * path.stat().st_size
    ):
        raise ValueError('its tensors share what they hold')
    return about, blocks


def _block(block: Any, path: Path) -> dict[str, Any]:
    if type(block) is not dict or set(block) != {'name', 'params', 'sqnr_db'}:
        raise ValueError('a block has other keys')
    about = plain({key: block[key] for key in ('name', 'sqnr_db')}, str(path))
    ratios = about['sqnr_db']
    if not isinstance(about['name'], str) or not isinstance(ratios, dict):
        raise TypeError('a block has no name or ratios')
    if not all(ratio is None or isinstance(ratio, float) for ratio in ratios.values()):
        raise TypeError('a ratio is no number')
    return {**about, 'params': dict(checked_state(block['params'], path))}
