"""Checkpoints of other code bases, for mmdet 3 and mmsegmentation 1."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..engine.checkpoint import read_file, save_atomically
from ..engine.layouts import Conversion, convert_keys
from ..errors import QuantizationError


def convert_checkpoint(source: str | Path, target: str | Path, kind: str | None = None) -> Conversion:
    """Converts a checkpoint of a Swin or ViT backbone, or of a whole model with a Swin backbone.

    Args:
        source: A file of ``torch.save``, its weights under ``state_dict``, under ``model`` or at the top, or of safetensors.
        target: The file to write, ``.pth``: its weights under ``state_dict``, what the source has under ``meta`` there too.
        kind: The layout that the source must have, ``swin`` or ``vit``; by default it is found by the keys.

    Returns:
        The new weights, and what was done to them.

    Raises:
        QuantizationError: If the source cannot be read or its keys are not those of a known layout.
    """
    source, target = Path(source), Path(target)
    if target.suffix != '.pth' or target.is_dir() or target.resolve() == source.resolve():
        raise QuantizationError(f'{target}: name another file than the source, one that ends with .pth')
    content = _read_safetensors(source) if source.suffix == '.safetensors' else read_file(source)
    weights: Any = content
    if isinstance(content, Mapping):
        weights = next((content[name] for name in ('state_dict', 'model') if name in content), content)
    if not isinstance(weights, Mapping) or not weights or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        raise QuantizationError(f'{source} holds no weights, neither under state_dict or model nor at the top')
    try:
        conversion = convert_keys(weights, kind)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    meta = content.get('meta')
    target.parent.mkdir(parents=True, exist_ok=True)
    save_atomically({'meta': meta if isinstance(meta, Mapping) else {}, 'state_dict': conversion.state_dict}, target)
    return conversion


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise QuantizationError(f'{path} cannot be read: {error}') from None
