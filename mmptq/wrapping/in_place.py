"""The quantization of a module that is built already, without a config or a Runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..backbones import BackboneSpec, Recipe, convert, find_spec
from ..backbones.presets import load_recipe
from ..calibration import BlockResult, Call, calibrate


def quantize_(
    module: nn.Module,
    inputs: Sequence[Any],
    recipe: str | Mapping[str, Any] = 'adalog_w4a4',
    *,
    spec: BackboneSpec | None = None,
    seed: int = 0,
) -> list[BlockResult]:
    """Quantizes a backbone in place and calibrates it on some inputs.

    Needs mmengine, which reads recipes, and no mmcv, mmdet or mmsegmentation. The
    module is put into evaluation mode; its outputs are then those of the simulated
    quantized model (:func:`mmptq.to_integer` makes it one of integers).

    Args:
        module: A Swin or ViT of timm, mmdet, mmsegmentation or mmpretrain, or any other
            with a ``spec``; float32.
        inputs: What it is called with in calibration, one entry a call: a tensor, such
            as an image batch (1, 3, height, width), or a tuple of arguments.
        recipe: As for :func:`mmptq.quantize`.
        spec: What of the module is quantized; by default that of its class.
        seed: Of the samples of tokens.

    Returns:
        For each block, in forward order: its parameters, and the signal to quantization
        noise ratio of each operation, dB.

    Raises:
        QuantizationError: If the recipe is wrong, the module has no BackboneSpec or
            does not fit it, or there are no inputs.
    """
    checked = Recipe.from_dict(load_recipe(recipe))
    found = find_spec(module) if spec is None else spec
    convert(module, found, checked)
    module.eval()
    calls = [Call(each if isinstance(each, tuple) else (each,)) for each in inputs]
    names = found.block_names(module)
    return calibrate(module, names, calls, checked.build_method(), seed)
