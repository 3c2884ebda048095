"""The registered build functions: they build what the original config builds, then convert it in place."""
from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec as find_module
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from ..errors import QuantizationError
from ..quantizers import calibrated_parts
from ..registry import MODELS
from .convert import ConversionReport, convert, convert_layers, layers_with_products, leave_float
from .presets import load_recipe
from .recipe import Recipe
from .spec import Site, find_spec

TRAINING_ONLY = ('auxiliary_head.',)
"""Parts of a segmentor that a test does not run."""


def refuse_half(module: nn.Module, incompatible_keys: object) -> None:
    """After a checkpoint was loaded: raises QuantizationError if it calibrated some quantizers and others not."""
    quantizers = calibrated_parts(module)
    absent = [f'{name}.{key}' for name, child in quantizers.items() for key in child.param_names if getattr(child, key) is None]
    if absent and any(quantizer.params is not None for quantizer in quantizers.values()):
        raise QuantizationError(f'the checkpoint lacks parameters of quantizers: {", ".join(absent[:5])}'
                                + (f' and {len(absent) - 5} more' if len(absent) > 5 else ''))


def build_float(cfg: dict[str, Any]) -> Any:
    """What a config describes.

    Raises:
        QuantizationError: If its class or that of its backbone is of a package that is not installed.
    """
    try:
        return MMENGINE_MODELS.build(cfg)
    except KeyError as error:  # the registry knows no such class
        for name in (part.get('type') for part in (cfg, cfg.get('backbone') or {})):
            package, dot, _ = name.partition('.') if isinstance(name, str) else ('', '', '')
            if dot and find_module(package) is None:
                raise QuantizationError(f"type='{name}' needs {package}, which is not installed: pip install {package}") from error
        raise


@MODELS.register_module()
def QuantBackbone(backbone: dict[str, Any], recipe: str | dict[str, Any]) -> nn.Module:  # noqa: N802
    """Builds a backbone and makes it quantizable.

    Args:
        backbone: The config of the float backbone.
        recipe: See :func:`mmptq.backbones.presets.load_recipe`.

    Returns:
        The backbone itself, float until calibrated, with a :class:`ConversionReport` as its attribute ``quantization``.

    Raises:
        QuantizationError: If the backbone has no BackboneSpec or is of a package that is missing, or the recipe is wrong.
    """
    checked = Recipe.from_dict(load_recipe(recipe))
    built = build_float(backbone)
    built.register_load_state_dict_post_hook(refuse_half)
    built.quantization = convert(built, find_spec(built), checked)
    return built


@MODELS.register_module()
def QuantModel(model: dict[str, Any], recipe: str | dict[str, Any], idle: Sequence[str] = ()) -> nn.Module:  # noqa: N802
    """Builds a whole detector or segmentor and makes its backbone, neck and heads quantizable.

    Args:
        model: The config of the float model.
        recipe: See :func:`mmptq.backbones.presets.load_recipe`.
        idle: Layers that received nothing in calibration, and so stay float.

    Returns:
        The model itself, float until calibrated, with a :class:`ConversionReport` as its attribute ``quantization``.

    Raises:
        QuantizationError: If the model has no backbone that we know or is of a package that is missing, the recipe is wrong, or an
            idle layer is none of its own.
    """
    checked = Recipe.from_dict(load_recipe(recipe))
    built = build_float(model)
    built.register_load_state_dict_post_hook(refuse_half)
    if not isinstance(getattr(built, 'backbone', None), nn.Module):
        raise QuantizationError(f'{type(built).__name__} has no backbone')
    backbone = convert(built.backbone, find_spec(built.backbone), checked)
    outside = {name: layer for name, layer in layers_with_products(built).items() if not name.startswith('backbone.')}
    sites: dict[str, Site | None] = {name: 'linear' if isinstance(layer, nn.Linear) else 'conv' for name, layer in outside.items()
                                     if not name.startswith(TRAINING_ONLY)}
    skipped = {f'backbone.{name}': reason for name, reason in backbone.skipped.items()} | convert_layers(built, sites, checked)
    skipped |= {name: 'runs in training only' for name in outside if name not in sites}
    built.quantization = ConversionReport(checked, 'model', skipped)
    leave_float(built, built.quantization, idle)
    return built
