"""One row for every layer of a model, quantized or not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..backbones.convert import layers_with_products
from ..backbones.reasons import FloatReason
from ..calibration import operations
from ..layers import QuantOp
from .summary import LayerSummary


def layer_rows(
    model: nn.Module,
    skipped: Mapping[str, FloatReason],
    sqnr_db: Mapping[str, float | None],
) -> list[LayerSummary]:
    """A row for every linear layer, convolution and attention product of a model, in
    the model's order.

    Args:
        model: The model.
        skipped: By layer or product that stays float: the reason.
        sqnr_db: By quantized operation, see :class:`mmptq.calibration.BlockResult`.
    """
    quantized: dict[str, nn.Module] = dict(operations(model))
    left = {
        name: layer
        for name, layer in layers_with_products(model).items()
        if name not in quantized
    }
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}

    rows = []
    for name, layer in sorted(
        (quantized | left).items(), key=lambda item: order[item[0]]
    ):
        if isinstance(layer, QuantOp):
            rows.append(
                quantized_row(name, layer, sqnr_db.get(name), skipped.get(name))
            )
        else:
            rows.append(float_row(name, layer, skipped[name]))
    return rows


def quantized_row(
    name: str,
    operation: QuantOp,
    sqnr_db: float | None,
    reason: FloatReason | None = None,
) -> LayerSummary:
    """The row of a quantized operation, or of a product that is kept float, with the
    reason.
    """
    quantizers = operation.quantizers()
    sites = [site for site in operation.sites.values() if site != 'weight']
    effective = {
        role: round(each.effective_bits, 3) for role, each in quantizers.items()
    }
    return LayerSummary(
        name=name,
        kind=operation.kind,
        site='/'.join(sites),
        bits={role: each.bits for role, each in quantizers.items()},
        effective_bits=effective,
        quantizer={role: type(each).__name__ for role, each in quantizers.items()},
        uniform={role: each.uniform for role, each in quantizers.items()},
        sqnr_db=sqnr_db,
        reason=reason,
    )


def float_row(name: str, layer: nn.Module, reason: FloatReason) -> LayerSummary:
    """The row of a layer that stays float."""
    return LayerSummary(
        name=name,
        kind=type(layer).__name__,
        site=None,
        bits=None,
        effective_bits=None,
        quantizer=None,
        uniform=None,
        sqnr_db=None,
        reason=reason,
    )
