"""Checkpoints: read without unpickling code, checked key by key, written whole or not at all."""
from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from ..errors import QuantizationError
from ..quantizers import calibrated_parts


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within it every ``torch.load``, mmengine's too, reads tensors and plain data only, never code.

    mmengine asks for full unpickling (or fails on its own files, before 0.11); what a Runner saves beside the weights, loss
    histories, is allowed by name.
    """
    multiarray = (getattr(np, '_core', None) or np.core).multiarray  # numpy 2 or 1
    dtypes = [type(np.dtype(kind)) for kind in (np.int64, np.int32, np.float64, np.float32)]
    allowed: list[Any] = [HistoryBuffer, (_history_method, 'builtins.getattr'), np.ndarray, np.dtype, *dtypes,
                          multiarray._reconstruct, multiarray.scalar]
    name = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = os.environ.get(name)
    os.environ[name] = '1'
    try:
        # Before torch 2.5 nothing can be allowed, and only checkpoints without loss histories (published ones) are read.
        with torch.serialization.safe_globals(allowed) if hasattr(torch.serialization, 'safe_globals') else nullcontext():
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _history_method(owner: Any, name: str) -> Any:
    # A HistoryBuffer pickles its own methods by way of getattr, which must not reach anything else.
    if owner is not HistoryBuffer or name not in ('mean', 'max', 'min', 'current'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed')
    return getattr(owner, name)


def read_file(path: str | Path) -> Any:
    """What a file written by ``torch.save`` holds, tensors and plain data only.

    Raises:
        QuantizationError: If it is missing, broken, or needs code to be read.
    """
    if not Path(path).is_file():
        raise QuantizationError(f'checkpoint {path} ' + ('is no file' if Path(path).exists() else 'does not exist'))
    try:
        with safe_loading():
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a broken file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if 'Unpickler error' in line), lines[0])
        raise QuantizationError(f'{path} cannot be read safely as a checkpoint (weights_only): {reason}') from None


def load_file(path: str | Path) -> dict[str, Any]:
    """A checkpoint file's content, with the weights under ``state_dict``.

    Raises:
        QuantizationError: If it is missing, is no checkpoint, or needs code to be read.
    """
    checkpoint = read_file(path)
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint['state_dict'], Mapping) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint['state_dict'].items()):
        raise QuantizationError(f'{path} holds no state_dict')
    return checkpoint


def load_checked(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads weights, float or quantized, and refuses what does not fit.

    Args:
        model: A model with quantized operations.
        state_dict: Its weights, by the float model's names, with or without parameters of quantizers.
        source: Where they come from, for messages.

    Returns:
        Surplus keys that no quantizer wants; the Runner passes over them as well.

    Raises:
        QuantizationError: If weights are missing or have other shapes; if parameters of some quantizers, but not of all, are
            there; or if some have no quantizer.
    """
    state = {re.sub(r'^module\.', '', key): value for key, value in state_dict.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    except RuntimeError as error:
        mismatches = [line.strip() for line in str(error).splitlines()[1:]]
        raise QuantizationError(f'{source} is of another model: {some(mismatches)}') from None
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    if missing:
        raise QuantizationError(f'{source} is of another model: it lacks {some(missing)}'
                                + (f', and has instead {some(unexpected)}' if unexpected else ''))
    quantizers = calibrated_parts(model)
    absent = [f'{name}.{key}' for name, module in quantizers.items() for key in module.param_names if getattr(module, key) is None]
    surplus = [key for key in unexpected if '_quantizer.' in key or '.rescale.' in key]
    if surplus:
        raise QuantizationError(f'{source} has parameters of quantizers that the recipe does not have: {some(surplus)}')
    if absent and any(module.params is not None for module in quantizers.values()):
        raise QuantizationError(f'{source} lacks parameters of quantizers: {some(absent)}')
    return list(unexpected)


def is_calibrated(model: nn.Module) -> bool:
    """Whether all quantizers of a model have parameters."""
    return all(module.params is not None for module in calibrated_parts(model).values())


def save_atomically(data: Any, path: Path) -> None:
    """``torch.save`` to a file that is there whole or not at all."""
    write_atomically(path, lambda temporary: torch.save(data, temporary))


def write_atomically(path: Path, write: Any) -> None:
    """Calls ``write(temporary)`` and renames the file it wrote to ``path``."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def some(names: list[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
