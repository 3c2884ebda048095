"""Converts a built backbone in place: module and parameter names stay, so any
checkpoint of the float one loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import QuantizationError
from ..layers import (
    QuantConv2d,
    QuantLinear,
    QuantMatMul,
    QuantOp,
    SelfAttention,
    extend_attention,
)
from ..quantizers import Float, calibrated_parts
from .by_layer import PREFIX, require_matches
from .reasons import FloatReason
from .recipe import Recipe
from .spec import BackboneSpec, Site, matches

# Subclasses of nn.Linear and nn.Conv2d that compute just what these do.
_PLAIN = {
    'torch.nn.modules.linear.Linear',
    'torch.nn.modules.linear.NonDynamicallyQuantizableLinear',
    'torch.nn.modules.conv.Conv2d',
    'mmcv.cnn.bricks.wrappers.Linear',
    'mmcv.cnn.bricks.wrappers.Conv2d',
}


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        recipe: The recipe. :func:`leave_float` adds to its ``layers``.
        scope: ``backbone`` or ``model``.
        skipped: Layers and products of the converted module that stay float, with the
            reason. :func:`leave_float` adds to it.
    """

    recipe: Recipe
    scope: str
    skipped: dict[str, FloatReason]


def layers_with_products(module: nn.Module) -> dict[str, nn.Module]:
    """All layers with a matrix or kernels, and opaque attentions, by name: what a
    quantized model must account for.
    """
    opaque = tuple(
        f'{name}.'
        for name, child in module.named_modules()
        if isinstance(child, nn.MultiheadAttention)
    )
    return {
        name: child
        for name, child in module.named_modules()
        if (_multiplies(child) or isinstance(child, nn.MultiheadAttention))
        and not name.startswith(opaque)
    }


def convert(
    backbone: nn.Module, spec: BackboneSpec, recipe: Recipe
) -> ConversionReport:
    """Replaces the layers and attention products that a spec names by quantized
    operations; all are float until calibrated.

    Raises:
        QuantizationError: If the backbone has none of the spec's blocks or attentions,
            or an entry of the recipe's ``layers`` matches nothing in it.
    """
    report = ConversionReport(
        recipe, 'backbone', convert_backbone(backbone, spec, recipe)
    )
    check_fit(backbone, recipe, PREFIX)
    return report


def check_fit(module: nn.Module, recipe: Recipe, prefix: str = '') -> None:
    """Whether a recipe's ``layers`` fit a converted module, whose name in the whole
    model is a prefix.

    Raises:
        QuantizationError: If an entry matches nothing, with names that are near; or if
            they leave nothing to be quantized.
    """
    products = [
        name for name, child in module.named_modules() if isinstance(child, QuantMatMul)
    ]
    names = [f'{prefix}{name}' for name in (*layers_with_products(module), *products)]
    require_matches(recipe.layers, names, type(module).__name__)
    if recipe.layers and not calibrated_parts(module):
        raise QuantizationError(
            f'recipe {recipe.name} leaves all layers of {type(module).__name__} float:'
            ' there is nothing to quantize'
        )


def convert_backbone(
    backbone: nn.Module, spec: BackboneSpec, recipe: Recipe
) -> dict[str, FloatReason]:
    """:func:`convert`, without looking for entries of ``layers`` that match nothing.

    Returns:
        The layers and products that stay float, with the reason.
    """
    spec.block_names(backbone)
    attentions = [
        name for name, _ in backbone.named_modules() if matches(name, spec.attentions)
    ]
    if not attentions:
        raise QuantizationError(
            f'{type(backbone).__name__} has no attention named like'
            f' {", ".join(spec.attentions)}'
        )
    skipped: dict[str, FloatReason] = {}
    for name in attentions:
        attention = backbone.get_submodule(name)
        if isinstance(attention, nn.MultiheadAttention):
            new = SelfAttention.from_float(attention)
            replace_modules(backbone, {attention: new})
            attention = new
        qk, pv = extend_attention(attention)
        heads = getattr(attention, 'num_heads', None)
        heads = heads if isinstance(heads, int) else None
        for own, product, sites in (
            (f'{name}.qk', qk, {'left': 'query', 'right': 'key'}),
            (f'{name}.pv', pv, {'left': 'post_softmax', 'right': 'value'}),
        ):
            layer = recipe.for_layer(PREFIX + own)
            if layer is None:
                product.set_quantizers(sites, {role: Float() for role in sites}, heads)
                skipped[own] = FloatReason.KEPT
            else:
                layer.equip(product, sites, heads)
    return skipped | convert_layers(
        backbone,
        {name: spec.site(name) for name in layers_with_products(backbone)},
        recipe,
        PREFIX,
    )


def convert_layers(
    module: nn.Module, sites: dict[str, Site | None], recipe: Recipe, prefix: str = ''
) -> dict[str, FloatReason]:
    """Replaces Linear and Conv2d layers by quantized ones. For a layer under several
    names its first one counts.

    Args:
        module: Where the layers are.
        sites: By layer: the site of its input, or None to leave it float.
        recipe: Gives the quantizers.
        prefix: What their names begin with in the whole model.

    Returns:
        The layers that stay float, with the reason.
    """
    skipped: dict[str, FloatReason] = {}
    for name, site in sites.items():
        layer = module.get_submodule(name)
        cls = f'{type(layer).__module__}.{type(layer).__name__}'
        op: QuantOp
        if site is None:
            skipped[name] = FloatReason.NO_SITE
            continue
        if cls not in _PLAIN:
            skipped[name] = FloatReason.NO_QUANTIZED_FORM
            continue
        own = recipe.for_layer(prefix + name)
        if own is None:
            skipped[name] = FloatReason.KEPT
            continue
        if isinstance(layer, nn.Linear):
            op = QuantLinear.from_float(layer)
        else:
            assert isinstance(layer, nn.Conv2d)
            op = QuantConv2d.from_float(layer)
        own.equip(op, {'input': site, 'weight': 'weight'})
        replace_modules(module, {layer: op})
    return skipped


def leave_float(
    model: nn.Module, report: ConversionReport, names: Iterable[str]
) -> None:
    """Puts float layers in the place of quantized ones that received nothing in
    calibration, and says so in the report and its recipe.

    Args:
        model: The whole model.
        report: Of its conversion.
        names: Of the layers.

    Raises:
        QuantizationError: If one is no quantized layer of the model, naming it.
    """
    modules = dict(model.named_modules())
    for name in names:
        op = modules.get(name)
        if not isinstance(op, QuantLinear | QuantConv2d):
            raise QuantizationError(
                f'{name} is to stay float, but is no layer of the model that could be'
                ' quantized'
            )
        replace_modules(model, {op: op.to_float()})
        report.skipped[name] = FloatReason.IDLE
        report.recipe = report.recipe.leaving_float([name])


def _multiplies(module: nn.Module) -> bool:
    weight = module._parameters.get('weight')
    return (
        weight is not None and weight.ndim > 1 and not isinstance(module, nn.Embedding)
    )


def replace_modules(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Puts modules in the places of others, wherever these are: layers may be shared."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
