"""Packed checkpoints: one made from quantized.pth, and a model from one."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..engine.checkpoint import load_file
from ..engine.data import load_config
from ..engine.hook import how_made, load_verified
from ..engine.packed import SUFFIX, check_types, float_model, read_packed, write_packed
from ..errors import QuantizationError
from .quantize import quantized_config


def pack(config: str | Config, checkpoint: str, out: str | None = None, cfg_options: Mapping[str, Any] | None = None) -> Path:
    """Packs a quantized checkpoint.

    Args:
        config: The config that it was quantized from, or its ``quantized.py``.
        checkpoint: ``quantized.pth``.
        out: The file to write, by default the checkpoint's name with the suffix ``.safetensors``.
        cfg_options: Changes of the config.

    Returns:
        The file.

    Raises:
        QuantizationError: If the checkpoint is not quantized or of another model, or cannot be packed.
    """
    path = Path(out or Path(checkpoint).with_suffix(SUFFIX))
    loaded = load_file(checkpoint)
    made = how_made(loaded, checkpoint)
    if made is None:
        raise QuantizationError(f'{checkpoint} is not quantized: there is nothing to pack (mmptq quantize --pack does both)')
    cfg = load_config(config, cfg_options)
    model = build_quantized(float_model(cfg), cfg.get('default_scope', 'mmengine'), made, loaded, checkpoint)
    write_packed(model, cfg, made, loaded['meta'].get('dataset_meta'), path)
    return path


def load_packed(path: str | Path, config: str | Config | None = None) -> nn.Module:
    """The quantized model of a packed checkpoint, in evaluation mode.

    Args:
        path: The file.
        config: A config of the float model, in place of what the file says of it. For a file of unknown origin: what is in a file is
            read without running any of it, but to build a model runs the classes that its config names.

    Raises:
        QuantizationError: If the file is damaged, of another kind, version or model, or its model cannot be built.
    """
    loaded = read_packed(path)
    made = how_made(loaded, str(path))
    if made is None:
        raise QuantizationError(f'{path} does not say how it was quantized')
    cfg = loaded['packed'] if config is None else load_config(config)
    if config is None:
        try:
            check_types(cfg['model'], cfg['default_scope'])
        except QuantizationError as error:
            raise QuantizationError(f'{path}: {error}') from None
    model = cfg['model'] if config is None else float_model(cfg)
    built = build_quantized(model, cfg.get('default_scope') or 'mmengine', made, loaded, str(path))
    built.dataset_meta = loaded['meta'].get('dataset_meta')  # as init_detector and init_model have it
    return built


def build_quantized(model: dict[str, Any], default_scope: str, made: Mapping[str, Any], loaded: Mapping[str, Any],
                    source: str) -> nn.Module:
    """The quantizable model of a float model's config, with a checkpoint, in evaluation mode."""
    init_default_scope(default_scope)
    cfg = quantized_config(Config(dict(model=model)), made['recipe'], made['scope'])
    try:
        built: nn.Module = MODELS.build(cfg.model)
    except QuantizationError:
        raise
    except Exception as error:  # what a config names may raise anything
        raise QuantizationError(f'the model of {source} cannot be built: {type(error).__name__}: {error}') from error
    load_verified(built, loaded, source)
    built.eval()
    return built
