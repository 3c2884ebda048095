"""How mmengine reads a local checkpoint once a quantized model is wanted: by us, running nothing of it.

The stock test tools, ``init_detector`` and ``init_model`` load checkpoints through mmengine, which
unpickles whatever they hold. This file is imported when a config names a class of ours for the first
time (it is a location of :data:`mmptq.registry.MODELS`), and not by ``import mmptq``: in a process
that has nothing to do with quantized models mmengine stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_from_http

from .about import how_made
from .packed import read_checkpoint
from .reading import safe_loading


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A checkpoint file, packed or of ``torch.save``; what it says of itself is checked.

    Raises:
        QuantizationError: If it is damaged, needs code to be read, or does not say how it was made.
    """
    checkpoint = read_checkpoint(str(Path(filename).expanduser()))
    how_made(checkpoint, filename)
    return checkpoint


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_address(filename: str, map_location: Any = None, **options: Any) -> dict[str, Any]:
    """A checkpoint that mmengine fetches, tensors and plain data only."""
    with safe_loading():
        checkpoint: dict[str, Any] = load_from_http(filename, map_location, **options)
    return checkpoint
