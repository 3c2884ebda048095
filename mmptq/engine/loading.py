"""A checkpoint for a converted model: loaded after a check that it is of this model and this recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backbones.build import refuse_other
from ..backbones.convert import leave_float
from ..calibration import check_weights
from ..checkpoints.about import how_made
from ..checkpoints.reading import is_calibrated, load_checked
from ..errors import QuantizationError
from .calibration import quantization


def load_verified(model: Any, checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Loads a checkpoint into a converted model, float or calibrated by the model's own recipe.

    Args:
        model: The detector or segmentor.
        checkpoint: What was read.
        source: The name of the file, for messages.

    Returns:
        Surplus keys, see :func:`load_checked`.

    Raises:
        QuantizationError: If it was calibrated by another recipe or at another scope, does not fit, or
            holds values that are not finite.
    """
    report = quantization(model)
    made = how_made(checkpoint, source)
    if made:
        refuse_other(report, made.to_dict(), source)

    idle = made.idle_layers() if made else []
    try:
        leave_float(
            model, report, [name for name in idle if name not in report.skipped]
        )
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    surplus = load_checked(model, checkpoint.get('state_dict', checkpoint), source)
    try:
        check_weights(model)
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None

    if is_calibrated(model) and not made:
        raise QuantizationError(
            f'{source} has parameters of quantizers, but does not say by which recipe it was made'
        )
    if made and not is_calibrated(model):
        raise QuantizationError(
            f'{source} says that it was quantized, but has no parameters of quantizers'
        )
    return surplus
