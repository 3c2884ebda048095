"""A checkpoint for a converted model: loaded after a check that it is of this model and
this recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..analysis.summary import About
from ..backbones import ConversionReport, Recipe
from ..backbones.build import refuse_other
from ..backbones.convert import leave_float
from ..calibration import check_weights
from ..checkpoints.about import how_made
from ..checkpoints.reading import is_calibrated, load_checked
from ..errors import QuantizationError
from .calibration import quantization


def load_verified(model: Any, checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Loads a checkpoint into a converted model, float or calibrated by the model's own
    recipe.

    Args:
        model: The detector or segmentor.
        checkpoint: What was read.
        source: The name of the file, for messages.

    Returns:
        Surplus keys, see :func:`load_checked`.

    Raises:
        QuantizationError: If it was calibrated by another recipe or at another scope,
            does not fit, or holds values that are not finite.
    """
    report = quantization(model)
    made = how_made(checkpoint, source)
    if made:
        leave_same_float(model, report, made, source)
        refuse_other(report, made.to_dict(), source)

    surplus = load_checked(model, checkpoint.get('state_dict', checkpoint), source)
    try:
        check_weights(model)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None

    if is_calibrated(model) and not made:
        raise QuantizationError(
            f'{source} has parameters of quantizers, but does not say by which recipe'
            ' it was made'
        )
    if made and not is_calibrated(model):
        raise QuantizationError(
            f'{source} says that it was quantized, but has no parameters of quantizers'
        )
    return surplus


def leave_same_float(
    model: Any, report: ConversionReport, made: About, source: str
) -> None:
    """Leaves those layers of neck and heads float that the calibration of a file left
    so.

    Only where its recipe is else the model's.

    Raises:
        QuantizationError: If one is no quantized layer of the model.
    """
    own, other = report.recipe, Recipe.from_dict(made.recipe)
    further = [entry.pattern for entry in other.layers[len(own.layers) :]]
    names = [name for name in further if not name.startswith('backbone.')]
    if report.scope != 'model' or not names or other != own.leaving_float(names):
        return
    try:
        leave_float(model, report, names)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
