"""How mmengine reads a local checkpoint once a quantized model is wanted: by us,
running nothing of it.

The stock test tools, ``init_detector`` and ``init_model`` load checkpoints through
mmengine, which unpickles whatever they hold. This file is imported when a config names
a class of ours for the first time (it is a location of :data:`mmptq.registry.MODELS`),
and not by ``import mmptq``: in a process that has nothing to do with quantized models
mmengine stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_from_http

from ..analysis.summary import About
from .about import dataset_meta, how_made
from .packed import read_checkpoint
from .plain import plain_parts
from .reading import safe_loading, without_unread


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A checkpoint file, packed or of ``torch.save``; what it says of itself is
    checked.

    Raises:
        QuantizationError: If it is damaged, needs code to be read, or does not say how
            it was made.
    """
    checkpoint = read_checkpoint(str(Path(filename).expanduser()))
    made = how_made(checkpoint, filename)
    state = OrderedDict(checkpoint['state_dict'])
    # Versions reach the module that loads a state dict: there recipe and scope are
    # compared.
    versions = dict(getattr(checkpoint['state_dict'], '_metadata', {}))
    if made:
        for root in ('', 'backbone'):
            versions[root] = {**versions.get(root, {}), 'mmptq': made.to_dict()}
    state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    others = {
        key: value
        for key, value in checkpoint.items()
        if key not in ('state_dict', 'meta')
    }
    return {
        **without_unread(others),
        'state_dict': state,
        'meta': _meta(checkpoint, made),
    }


def _meta(checkpoint: dict[str, Any], made: About | None) -> dict[str, Any]:
    """What a checkpoint says beside its weights, plain; without its config, which
    mmengine would run.

    ``init_detector`` and ``init_model`` use what is under ``CLASSES`` as it is.
    """
    given = checkpoint.get('meta')
    known = ('config', 'dataset_meta', 'mmptq')
    others = given.items() if type(given) is dict else ()
    meta = plain_parts(
        {key: value for key, value in others if key not in known}, 'meta'
    )
    names = meta.get('CLASSES', [])
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str) for name in names
    ):
        meta.pop('CLASSES')
    classes = dataset_meta(checkpoint)
    if classes:
        meta['dataset_meta'] = classes
    if made:
        meta['mmptq'] = made.to_dict()
    return meta


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_address(
    filename: str, map_location: Any = None, **options: Any
) -> dict[str, Any]:
    """A checkpoint that mmengine fetches, tensors and plain data only."""
    with safe_loading():
        checkpoint: dict[str, Any] = load_from_http(filename, map_location, **options)
    return checkpoint
