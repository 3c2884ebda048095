"""Packed checkpoints: one made from quantized.pth, and a model from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..analysis.summary import About
from ..checkpoints.about import dataset_meta, how_made
from ..checkpoints.packed import SUFFIX, read_packed, write_packed
from ..checkpoints.reading import load_file
from ..checkpoints.trusted import guarded, trusted_model
from ..engine.data import load_config
from ..engine.loading import load_verified
from ..errors import QuantizationError
from ..wrapping.configs import float_model, quantized_config


def pack(
    config: str | Config,
    checkpoint: str,
    out: str | None = None,
    cfg_options: Mapping[str, Any] | None = None,
) -> Path:
    """Packs a quantized checkpoint.

    Args:
        config: The config that it was quantized from, or its ``quantized.py``.
        checkpoint: ``quantized.pth``.
        out: The file to write, by default the checkpoint's name with the suffix
            ``.safetensors``.
        cfg_options: Changes of the config.

    Returns:
        The file.

    Raises:
        QuantizationError: If the checkpoint is not quantized or of another model, or
            cannot be packed.
    """
    path = Path(out or Path(checkpoint).with_suffix(SUFFIX))
    # First: what a config imports may register quantizers and methods of the user's.
    cfg = load_config(config, cfg_options)
    loaded = load_file(checkpoint)
    made = how_made(loaded, checkpoint)
    if made is None:
        raise QuantizationError(
            f'{checkpoint} is not quantized: there is nothing to pack (mmptq quantize'
            ' --pack does both)'
        )
    model = build_quantized(
        float_model(cfg), cfg.get('default_scope', 'mmengine'), made, loaded, checkpoint
    )
    write_packed(model, cfg, made.to_dict(), dataset_meta(loaded), path)
    return path


def load_packed(path: str | Path, config: str | Config | None = None) -> nn.Module:
    """The quantized model of a packed checkpoint, in evaluation mode.

    Nothing that is in the file runs. Without a config, the model is built from what the
    file says of it: only of classes on a list (:mod:`mmptq.checkpoints.trusted`).

    Args:
        path: The file.
        config: A config of the float model, in place of what the file says of it; what
            this names is run as any config is.

    Raises:
        QuantizationError: If the file is damaged, of another kind, version or model, or
            its model cannot be built.
    """
    source = str(path)
    cfg = None if config is None else load_config(config)
    loaded = read_packed(path)
    made = how_made(loaded, source)
    if made is None:
        raise QuantizationError(f'{source} does not say how it was quantized')
    if cfg is None:
        built = _build_from_file(loaded, made, source)
    else:
        scope = cfg.get('default_scope') or 'mmengine'
        built = build_quantized(float_model(cfg), scope, made, loaded, source)
    built.dataset_meta = dataset_meta(loaded) or None  # type: ignore[assignment]  # as init_detector and init_model have it
    return built


def _build_from_file(loaded: Mapping[str, Any], made: About, source: str) -> nn.Module:
    packed, state = loaded['packed'], loaded['state_dict']
    try:
        model = trusted_model(packed['model'], packed['default_scope'])
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    with guarded(len(state), sum(value.numel() for value in state.values())):
        return build_quantized(model, packed['default_scope'], made, loaded, source)


def build_quantized(
    model: dict[str, Any],
    default_scope: str,
    made: About,
    loaded: Mapping[str, Any],
    source: str,
) -> nn.Module:
    """The quantizable model of a float model's config, with a checkpoint, in evaluation
    mode.
    """
    init_default_scope(default_scope)
    cfg = quantized_config(Config(dict(model=model)), made.recipe, made.scope)
    try:
        built: nn.Module = MODELS.build(cfg.model)
    except QuantizationError as error:
        raise QuantizationError(
            f'the model of {source} cannot be built: {error}'
        ) from error
    except Exception as error:  # what a config names may raise anything
        reason = f'{type(error).__name__}: {error}'
        raise QuantizationError(
            f'the model of {source} cannot be built: {reason}'
        ) from error
    load_verified(built, loaded, source)
    built.eval()
    return built
