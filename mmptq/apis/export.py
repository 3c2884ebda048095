"""A quantized backbone as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config

from ..checkpoints.about import how_made
from ..checkpoints.packed import read_checkpoint
from ..engine.data import load_config
from ..errors import QuantizationError
from ..wrapping.configs import float_model
from .packed import build_quantized

if TYPE_CHECKING:
    from ..export.onnx import Difference


def export(
    config: str | Config,
    checkpoint: str,
    out: str,
    shape: tuple[int, int],
    dynamic: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """Writes the backbone of a quantized model as an ONNX file, after a comparison of
    ONNX Runtime with torch (docs/onnx.md).

    Args:
        config: The config that it was quantized from, or its ``quantized.py``.
        checkpoint: ``quantized.pth`` or ``quantized.safetensors``.
        out: The file to write, ``.onnx``.
        shape: Height and width of the images that the backbone gets.
        dynamic: Whether it is to take any height and width.
        cfg_options: Changes of the config.

    Returns:
        How far ONNX Runtime is from torch, at each shape that was compared.

    Raises:
        QuantizationError: If ONNX is not installed, the checkpoint is not quantized or
            of another model, the backbone cannot be exported, or ONNX Runtime computes
            something else.
    """
    path = Path(out)
    if path.suffix != '.onnx' or path.is_dir():
        raise QuantizationError(f'{path}: name a file that ends with .onnx')
    if not path.parent.is_dir():
        raise QuantizationError(f'{path}: the directory {path.parent} does not exist')
    if min(shape) < 1:
        raise QuantizationError(
            f'--shape {shape[0]} {shape[1]}: height and width are at least 1'
        )
    try:
        from ..export.onnx import export_onnx
    except ModuleNotFoundError as error:
        raise QuantizationError(
            f'{error.name} is not installed, which an export to ONNX needs: pip install'
            ' mmptq[onnx]'
        ) from None
    # First: what a config imports may register quantizers and methods of the user's.
    cfg = load_config(config, cfg_options)
    loaded = read_checkpoint(checkpoint)
    made = how_made(loaded, checkpoint)
    if made is None:
        raise QuantizationError(
            f'{checkpoint} is not quantized: there is nothing to export (mmptq quantize'
            ' makes quantized.pth)'
        )
    model: Any = build_quantized(
        float_model(cfg), cfg.get('default_scope', 'mmengine'), made, loaded, checkpoint
    )
    return export_onnx(model.backbone, path, shape, dynamic)
