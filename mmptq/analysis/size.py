"""How large the weights of a model are, float and packed."""

from __future__ import annotations

from torch import nn

from ..layers import QuantOp
from .summary import Sizes

MIB = 2**20


def model_size(model: nn.Module) -> Sizes:
    """Sizes of the weights, MiB: all in float32, and with quantized ones packed at
    their bits.

    A scale (float32) and a zero point (one byte) are counted for each channel.
    """
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    saved = 0.0
    for module in model.modules():
        if isinstance(module, QuantOp) and 'weight' in module.roles:
            saved += bytes_saved(module)
    return Sizes(
        float_mib=round(total / MIB, 3), quantized_mib=round((total - saved) / MIB, 3)
    )


def bytes_saved(operation: QuantOp) -> float:
    """How many bytes less than in float32 the packed weight of an operation takes,
    scales counted.
    """
    weight = operation.get_parameter('weight')
    quantizer = operation.quantizer('weight')
    channels = 1 if quantizer.axis is None else weight.shape[quantizer.axis]
    return weight.numel() * (4 - quantizer.bits / 8) - 5 * channels
