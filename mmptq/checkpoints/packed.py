"""The packed checkpoint: one safetensors file with weights as b-bit integers and all
that rebuilds the model (docs/packed.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from mmengine.config import Config
from torch import nn

from ..backbones import Recipe
from ..errors import QuantizationError
from ..wrapping.configs import float_model
from .about import checked_about
from .packing import pack_state, unpack_state
from .plain import plain
from .reading import checked_state, is_calibrated, load_file, require_file
from .writing import write_atomically

FORMAT, VERSION = 'mmptq-packed', 1
SUFFIX = '.safetensors'
CONTENT = {
    'weights': dict,
    'adalog': list,
    'model': dict,
    'default_scope': str,
    'dataset_meta': dict,
    'mmptq': dict,
}
"""Keys of the metadata, and the type of each."""


def write_packed(
    model: nn.Module,
    cfg: Config,
    about: Mapping[str, Any],
    dataset_meta: Mapping[str, Any] | None,
    path: Path,
) -> None:
    """Writes a calibrated model, whole or not at all.

    Args:
        model: The detector or segmentor.
        cfg: The config that it was built from.
        about: What ``summary.json`` says of it.
        dataset_meta: What its checkpoint says of its classes.
        path: The file, ``.safetensors``.

    Raises:
        QuantizationError: If it is not calibrated, or a weight or the config cannot be
            written.
    """
    if path.suffix != SUFFIX:
        raise QuantizationError(f'{path}: a packed checkpoint is a {SUFFIX} file')
    if not is_calibrated(model):
        raise QuantizationError('the model is not calibrated: there is nothing to pack')
    tensors, layout = pack_state(model)
    content = dict(
        layout,
        version=VERSION,
        model=packed_model(cfg),
        default_scope=cfg.get('default_scope') or 'mmengine',
        dataset_meta=_to_json(dict(dataset_meta or {}), 'dataset_meta'),
        mmptq=_to_json(dict(about), 'mmptq'),
    )
    metadata = {
        FORMAT: json.dumps(content, sort_keys=True)
    }  # one entry: safetensors would write several in any order
    try:
        write_atomically(
            path,
            lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata),
        )
    except safetensors.SafetensorError as error:
        raise QuantizationError(f'{path} cannot be written: {error}') from None


def read_packed(path: str | Path) -> dict[str, Any]:
    """A packed checkpoint as ``quantized.pth`` would have it, and under ``packed`` the
    metadata that this one has no place for.

    Raises:
        QuantizationError: If the file is missing, truncated or of another kind or
            version, or something in it is missing or does not fit.
    """
    require_file(path)
    try:
        with safetensors.safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise QuantizationError(
            f'{path} cannot be read as a safetensors file, it is damaged or truncated:'
            f' {error}'
        ) from None
    tensors = dict(checked_state(tensors, path))
    try:
        content = _checked(metadata)
        state = unpack_state(tensors, content['weights'], content['adalog'])
    except QuantizationError as error:
        raise QuantizationError(f'{path}: {error}') from None
    content['mmptq'] = checked_about(content['mmptq'], str(path)).to_dict()
    meta = {
        'mmptq': content['mmptq'],
        **(
            {'dataset_meta': content['dataset_meta']} if content['dataset_meta'] else {}
        ),
    }
    return {
        'meta': meta,
        'state_dict': state,
        'packed': {key: content[key] for key in ('model', 'default_scope')},
    }


def _checked(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The content of the metadata, its types checked."""
    if FORMAT not in metadata:
        raise QuantizationError(
            'is no packed checkpoint of mmptq (a float one is converted by mmptq'
            ' convert-checkpoint)'
        )
    try:
        content = plain(_from_json(json.loads(metadata[FORMAT])), 'its metadata')
    except (ValueError, RecursionError) as error:
        raise QuantizationError(f'its metadata is no JSON: {error}') from None
    version = content.get('version') if isinstance(content, dict) else None
    if version != VERSION:
        raise QuantizationError(
            f'is a packed checkpoint of version {version}, this mmptq reads version'
            f' {VERSION}; update mmptq, or pack the model again'
        )
    for key, kind in CONTENT.items():
        if not isinstance(content.get(key), kind):
            raise QuantizationError(f'its metadata has no {kind.__name__} {key}')
    bits = Recipe.from_dict(content['mmptq'].get('recipe') or {}).bits_of_weights()
    for name, layout in content['weights'].items():
        if (
            not isinstance(layout, dict)
            or not _is_one_of(layout.get('bits'), bits)
            or not _is_shape(layout.get('shape'))
        ):
            possible = ' or '.join(map(str, sorted(bits)))
            raise QuantizationError(
                f'{name} is to have {possible} bits, as the recipe says, and a shape,'
                f' not {layout}'
            )
    if not all(isinstance(name, str) for name in content['adalog']):
        raise QuantizationError(
            'its list of AdaLog quantizers holds something else than names'
        )
    return content


def _is_one_of(bits: Any, possible: set[int]) -> bool:
    return type(bits) is int and bits in possible


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 < len(value) < 6
        and all(type(size) is int and size > 0 for size in value)
    )


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint file's content, packed or not (:func:`load_file`)."""
    return read_packed(path) if path.endswith(SUFFIX) else load_file(path)


def packed_model(cfg: Config) -> dict[str, Any]:
    """The config of the float model as the metadata has it.

    Raises:
        QuantizationError: If there is none, or it is not plain data, naming the key.
    """
    packed: dict[str, Any] = _to_json(float_model(cfg), 'model')
    return packed


def _to_json(value: Any, where: str) -> Any:
    """Plain data as JSON has it; a tuple is ``{"__tuple__": [...]}``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _to_json(each, f'{where}.{key}') for key, each in value.items()}
    if isinstance(value, list | tuple):
        items = [
            _to_json(each, f'{where}.{number}') for number, each in enumerate(value)
        ]
        return {'__tuple__': items} if isinstance(value, tuple) else items
    raise QuantizationError(
        f'{where} cannot be packed: the file holds numbers, text, lists, tuples and'
        f' dicts with text as keys, not {value!r}'
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {'__tuple__'} and isinstance(value['__tuple__'], list):
        return tuple(_from_json(value['__tuple__']))
    return {key: _from_json(each) for key, each in value.items()}
