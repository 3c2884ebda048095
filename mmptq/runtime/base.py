"""What integer operations share: inputs and weights as integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..layers import QuantOp
from ..quantizers import Float, Quantizer, UniformQuantizer
from .coders import AdaLog, DeMax, Uniform, Whole, coder
from .errors import NoIntegerForm, required


class IntegerOp(nn.Module):
    """An operation whose product is one of integers.

    Attributes:
        path: How it is computed, for the report.
    """

    path: str


def has_hooks(module: nn.Module) -> bool:
    """Whether a module, or one in it, has forward hooks, which what replaces it would
    not run.
    """
    return any(
        each._forward_hooks or each._forward_pre_hooks for each in module.modules()
    )


def input_coder(op: QuantOp) -> Uniform | AdaLog:
    """The coder of a layer's input.

    Raises:
        NoIntegerForm: If it is float, has a step of its own in each row, or a scale for
            each channel.
    """
    found = coder(op.quantizer('input'))
    if isinstance(found, Whole):
        raise NoIntegerForm('its input is float')
    if isinstance(found, DeMax):
        raise NoIntegerForm('its input has a step for each row (DeMax)')
    if found.scale.numel() > 1:
        raise NoIntegerForm('its input has a scale for each channel')
    return found


def integer_weight(op: QuantOp) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's integers ``code - z``, int16, the scale of each output, (out,), and
    the weight that they stand for.

    Raises:
        NoIntegerForm: If the weight is float, or its quantizer has no entry in
            :data:`WEIGHTS`.
    """
    quantizer = op.quantizer('weight')
    if isinstance(quantizer, Float):
        raise NoIntegerForm('its weight is float')
    return required(WEIGHTS, quantizer, 'mmptq.runtime.base.WEIGHTS')(op, quantizer)


def uniform_weight(
    op: QuantOp, quantizer: UniformQuantizer
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`integer_weight` gives for a uniform quantizer."""
    weight, params = op.get_parameter('weight').detach(), quantizer.params
    assert params is not None
    rescale = getattr(op, 'rescale', None)
    codes = quantizer.encode(
        weight if rescale is None else rescale.weight(weight), **params
    )
    integers = codes - params['zero_point'].to(codes.dtype)
    return (
        integers,
        params['scale'].reshape(-1).expand(len(weight)).contiguous(),
        integers.to(weight.dtype) * params['scale'],
    )


WEIGHTS: dict[
    type[Quantizer], Callable[[QuantOp, Any], tuple[Tensor, Tensor, Tensor]]
] = {
    UniformQuantizer: uniform_weight,
}
"""What makes the integers of a weight, by the class of its quantizer."""
