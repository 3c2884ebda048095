"""What a quantized file says of itself, checked whole before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..analysis.summary import About, first_fault
from ..backbones import Recipe
from ..errors import QuantizationError
from .plain import plain, plain_parts


def checked_about(about: Any, source: str) -> About:
    """What a file says of itself.

    Raises:
        QuantizationError: If a key is missing, unknown or of another type; if its
            recipe is none; or if its bits or method are not those of its recipe.
    """
    try:
        content: dict[str, Any] = plain(about, 'what it says of itself')
        found = About.read(content)
        recipe = whole_recipe(found)
    except ValidationError as error:
        raise QuantizationError(
            f'{source} does not say how it was quantized, or was written by another'
            f' version of mmptq: {first_fault(error)}'
        ) from None
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    bits = found.bits.to_dict()
    if bits != recipe.to_dict()['bits'] or found.method != recipe.method_name:
        raise QuantizationError(
            f'{source} contradicts itself: it says {found.method}, bits {bits}, and its'
            f' recipe says {recipe.method_name}, bits {recipe.to_dict()["bits"]}'
        )
    return found.model_copy(update=dict(recipe=recipe.to_dict()))


def whole_recipe(about: About) -> Recipe:
    """The recipe of a file, with the layers that calibration left float.

    Version 0.1.0 did not write these into its recipe, but only as rows with their
    reason.
    """
    recipe = Recipe.from_dict(about.recipe)
    return recipe if recipe.layers else recipe.leaving_float(about.idle_layers())


def how_made(checkpoint: Mapping[str, Any], source: str) -> About | None:
    """What a quantized checkpoint says of itself; None of a float one.

    Raises:
        QuantizationError: If that is not what mmptq writes, see :func:`checked_about`,
            or the file has parameters of quantizers and says nothing of them.
    """
    meta = checkpoint.get('meta')
    about = meta.get('mmptq') if type(meta) is dict else None
    if about is not None:
        return checked_about(about, source)
    if any('_quantizer.' in key for key in checkpoint['state_dict']):
        raise QuantizationError(
            f'{source} has parameters of quantizers, but does not say by which recipe'
            ' it was made'
        )
    return None


def dataset_meta(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its data set, classes above all; without what is not
    plain data.
    """
    meta = checkpoint.get('meta')
    return plain_parts(
        meta.get('dataset_meta') if type(meta) is dict else None, 'dataset_meta'
    )
