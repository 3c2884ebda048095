"""Checkpoints of other code bases, for mmdet 3 and mmsegmentation 1."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoints.layouts import Conversion, convert_keys
from ..checkpoints.plain import plain_parts
from ..checkpoints.reading import checked_state, read_file
from ..checkpoints.writing import save_atomically
from ..errors import QuantizationError


def convert_checkpoint(
    source: str | Path, target: str | Path, kind: str | None = None
) -> Conversion:
    """Converts a checkpoint of a Swin or ViT backbone, or of a whole model with a Swin
    backbone.

    Args:
        source: A file of ``torch.save``, its weights under ``state_dict``, under
            ``model`` or at the top, or of safetensors.
        target: The file to write, ``.pth``: its weights under ``state_dict``, what the
            source has under ``meta`` there too.
        kind: The layout that the source must have, ``swin`` or ``vit``; by default it
            is found by the keys.

    Returns:
        The new weights, and what was done to them.

    Raises:
        QuantizationError: If the source cannot be read or its keys are not those of a
            known layout.
    """
    source, target = Path(source), Path(target)
    if (
        target.suffix != '.pth'
        or target.is_dir()
        or target.resolve() == source.resolve()
    ):
        raise QuantizationError(
            f'{target}: name another file than the source, one that ends with .pth'
        )
    content = (
        _read_safetensors(source)
        if source.suffix == '.safetensors'
        else read_file(source)
    )
    if type(content) in (dict, OrderedDict):
        parts = dict(dict.items(content))
        weights = next(
            (parts[name] for name in ('state_dict', 'model') if name in parts), content
        )
    else:
        parts, weights = {}, None
    if type(weights) not in (dict, OrderedDict) or not weights:
        raise QuantizationError(
            f'{source} holds no weights, neither under state_dict or model nor at'
            ' the top'
        )
    weights = checked_state(weights, source)
    try:
        conversion = convert_keys(weights, kind)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    target.parent.mkdir(parents=True, exist_ok=True)
    meta = plain_parts(parts.get('meta'), 'meta')
    save_atomically({'meta': meta, 'state_dict': conversion.state_dict}, target)
    return conversion


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise QuantizationError(f'{path} cannot be read: {error}') from None
