"""The registered build functions: they build what the original config builds, then
convert it in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec as find_module
from typing import Any

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from ..errors import QuantizationError
from ..quantizers import calibrated_parts
from ..registry import MODELS
from .convert import (
    ConversionReport,
    check_fit,
    convert,
    convert_backbone,
    convert_layers,
    layers_with_products,
    leave_float,
)
from .presets import load_recipe
from .reasons import FloatReason
from .recipe import Recipe
from .spec import Site, find_spec

TRAINING_ONLY = ('auxiliary_head.',)
"""Parts of a segmentor that a test does not run."""


def refuse_misfit(
    module: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    about: Mapping[str, Any],
    *_: Any,
) -> None:
    """Before a checkpoint is loaded, by whom ever: raises QuantizationError if it is
    calibrated and does not fit.

    mmengine passes over weights that are missing or have another shape. With quantizers
    that were calibrated for a whole model, that must not be: the key is named.
    ``about`` holds, under ``mmptq``, what a file that was read by us says of itself:
    recipe and scope must be the module's.
    """
    made = about.get('mmptq')
    if made:
        refuse_other(module.quantization, made, 'the checkpoint')  # type: ignore[arg-type]
    given = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }
    if not any('_quantizer.' in key for key in given):
        return  # a float checkpoint; its keys are compared elsewhere
    ranges = index_ranges(module)
    for name, own in module.state_dict().items():
        value = given.get(name)
        if value is None and not name.endswith(OPTIONAL):
            raise QuantizationError(
                f'the checkpoint is of another model: it lacks {prefix}{name}'
            )
        fault = None if value is None else state_fault(value, own, ranges.get(name))
        if fault and not is_parameter_of_quantizer(name):
            raise QuantizationError(
                f'the checkpoint is of another model: {prefix}{name} {fault}'
            )
    places = {
        f'{name}.{key}'
        for name, part in calibrated_parts(module).items()
        for key in part.param_names
    }
    surplus = [
        key
        for key in given
        if is_parameter_of_quantizer(key)
        and key not in places
        and not key.endswith('.gain')
    ]
    if surplus:
        raise QuantizationError(
            'the checkpoint has parameters of quantizers that the recipe does not'
            f' have: {prefix}{surplus[0]}'
        )


OPTIONAL = ('num_batches_tracked', '.rescale.gain')
"""Ends of the names that a checkpoint may lack: old ones have no counts, and where the
float weight is there a gain follows from it.
"""


def refuse_other(
    report: ConversionReport, made: Mapping[str, Any], source: str
) -> None:
    """Raises QuantizationError if a file says that it was quantized by another recipe,
    or at another scope, than a model is.
    """
    if (
        made['scope'] != report.scope
        or Recipe.from_dict(made['recipe']) != report.recipe
    ):
        raise QuantizationError(
            f'{source} was quantized with recipe {made["recipe"]["name"]}, bits'
            f' {made["bits"]}, scope {made["scope"]}, and not as asked for; use the'
            ' float checkpoint, or that recipe and scope'
        )


def is_parameter_of_quantizer(key: str) -> bool:
    """Whether a key of a state is that of a quantizer's parameter, which the quantizer
    itself checks.
    """
    return '_quantizer.' in key or '.rescale.' in key


def index_ranges(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Least and largest value of each buffer of whole numbers, such as the places in a
    table of biases.
    """
    return {
        name: (int(buffer.min()), int(buffer.max()))
        for name, buffer in module.named_buffers()
        if buffer.ndim and buffer.numel() and buffer.dtype in (torch.int64, torch.int32)
    }


def state_fault(value: Any, own: Tensor, places: tuple[int, int] | None) -> str | None:
    """Why a value cannot be that of a weight or buffer, if it is so."""
    if not isinstance(value, Tensor) or value.shape != own.shape:
        return (
            f'has the shape {tuple(getattr(value, "shape", ()))}, not'
            f' {tuple(own.shape)}'
        )
    if value.is_floating_point() != own.is_floating_point() or (
        value.dtype == torch.bool
    ) != (own.dtype == torch.bool):
        return f'is of type {value.dtype}, not {own.dtype}'
    if not bool(torch.isfinite(value.to(own.dtype)).all()):
        return 'holds values that are NaN or infinite'
    if (
        places
        and value.numel()
        and not places[0] <= int(value.min()) <= int(value.max()) <= places[1]
    ):
        return f'holds places outside of {places[0]} to {places[1]}'
    return None


def refuse_half(module: nn.Module, incompatible_keys: object) -> None:
    """After a checkpoint was loaded: raises QuantizationError if it calibrated some
    quantizers and others not.
    """
    quantizers = calibrated_parts(module)
    absent = [
        f'{name}.{key}'
        for name, child in quantizers.items()
        for key in child.param_names
        if getattr(child, key) is None
    ]
    if absent and any(
        quantizer.params is not None for quantizer in quantizers.values()
    ):
        raise QuantizationError(
            f'the checkpoint lacks parameters of quantizers: {", ".join(absent[:5])}'
            + (f' and {len(absent) - 5} more' if len(absent) > 5 else '')
        )


def watch_loading(module: nn.Module) -> None:
    """Has every checkpoint checked that is loaded into a module, also by tools that
    know nothing of mmptq.
    """
    module._register_load_state_dict_pre_hook(refuse_misfit, with_module=True)
    module.register_load_state_dict_post_hook(refuse_half)


def build_float(cfg: dict[str, Any]) -> Any:
    """What a config describes.

    Raises:
        QuantizationError: If its class or that of its backbone is of a package that is
            not installed.
    """
    try:
        return MMENGINE_MODELS.build(cfg)
    except KeyError as error:  # the registry knows no such class
        for name in (part.get('type') for part in (cfg, cfg.get('backbone') or {})):
            package, dot, _ = (
                name.partition('.') if isinstance(name, str) else ('', '', '')
            )
            if dot and find_module(package) is None:
                raise QuantizationError(
                    f"type='{name}' needs {package}, which is not installed: pip"
                    f' install {package}'
                ) from error
        raise


@MODELS.register_module()
def QuantBackbone(backbone: dict[str, Any], recipe: str | dict[str, Any]) -> nn.Module:  # noqa: N802
    """Builds a backbone and makes it quantizable.

    Args:
        backbone: The config of the float backbone.
        recipe: See :func:`mmptq.backbones.presets.load_recipe`.

    Returns:
        The backbone itself, float until calibrated, with a :class:`ConversionReport` as
        its attribute ``quantization``.

    Raises:
        QuantizationError: If the backbone has no BackboneSpec or is of a package that
            is missing, or the recipe is wrong.
    """
    checked = Recipe.from_dict(load_recipe(recipe))
    built = build_float(backbone)
    watch_loading(built)
    built.quantization = convert(built, find_spec(built), checked)
    return built


@MODELS.register_module()
def QuantModel(  # noqa: N802
    model: dict[str, Any], recipe: str | dict[str, Any], idle: Sequence[str] = ()
) -> nn.Module:
    """Builds a whole detector or segmentor and makes its backbone, neck and heads
    quantizable.

    Args:
        model: The config of the float model.
        recipe: See :func:`mmptq.backbones.presets.load_recipe`.
        idle: Layers that received nothing in calibration, and so stay float: of configs
            that an earlier version wrote; the present one writes them into the recipe's
            ``layers``.

    Returns:
        The model itself, float until calibrated, with a :class:`ConversionReport` as
        its attribute ``quantization``.

    Raises:
        QuantizationError: If the model has no backbone that we know or is of a package
            that is missing, the recipe is wrong, or an idle layer is none of its own.
    """
    checked = Recipe.from_dict(load_recipe(recipe))
    built = build_float(model)
    watch_loading(built)
    if not isinstance(getattr(built, 'backbone', None), nn.Module):
        raise QuantizationError(f'{type(built).__name__} has no backbone')
    backbone = convert_backbone(built.backbone, find_spec(built.backbone), checked)
    outside = {
        name: layer
        for name, layer in layers_with_products(built).items()
        if not name.startswith('backbone.')
    }
    sites: dict[str, Site | None] = {
        name: 'linear' if isinstance(layer, nn.Linear) else 'conv'
        for name, layer in outside.items()
        if not name.startswith(TRAINING_ONLY)
    }
    skipped = {
        f'backbone.{name}': reason for name, reason in backbone.items()
    } | convert_layers(built, sites, checked)
    skipped |= {
        name: FloatReason.TRAINING_ONLY for name in outside if name not in sites
    }
    check_fit(built, checked)
    built.quantization = ConversionReport(checked, 'model', skipped)
    leave_float(built, built.quantization, idle)
    return built
