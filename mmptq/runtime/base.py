"""What integer operations share: inputs and weights as integers."""
from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QuantOp
from ..quantizers import Float, Quantizer, UniformQuantizer
from .coders import AdaLog, DeMax, Uniform, Whole, coder
from .errors import NoIntegerForm, required

SUMS = 16
"""Outputs that are added for a sum of the codes: one and, for speed, those that make it a whole vector."""


class IntegerOp(nn.Module):
    """An operation whose product is one of integers.

    Attributes:
        path: How it is computed, for the report.
    """

    path: str


def has_hooks(module: nn.Module) -> bool:
    """Whether a module, or one in it, has forward hooks, which what replaces it would not run."""
    return any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


def input_coder(op: QuantOp) -> Uniform | AdaLog:
    """The coder of a layer's input.

    Raises:
        NoIntegerForm: If it is float, has a step of its own in each row, or a scale for each channel.
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
    """A weight's integers ``code - z``, int16, the scale of each output, (out,), and the weight that they stand for.

    Raises:
        NoIntegerForm: If the weight is float, or its quantizer has no entry in :data:`WEIGHTS`.
    """
    quantizer = op.quantizer('weight')
    if isinstance(quantizer, Float):
        raise NoIntegerForm('its weight is float')
    return required(WEIGHTS, quantizer, 'mmptq.runtime.base.WEIGHTS')(op, quantizer)


def uniform_weight(op: QuantOp, quantizer: UniformQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`integer_weight` gives for a uniform quantizer."""
    weight, params = op.get_parameter('weight').detach(), quantizer.params
    assert params is not None
    rescale = getattr(op, 'rescale', None)
    codes = quantizer.encode(weight if rescale is None else rescale.weight(weight), **params)
    integers = codes - params['zero_point'].to(codes.dtype)
    return integers, params['scale'].reshape(-1).expand(len(weight)).contiguous(), integers.to(weight.dtype) * params['scale']


WEIGHTS: dict[type[Quantizer], Callable[[QuantOp, Any], tuple[Tensor, Tensor, Tensor]]] = {
    UniformQuantizer: uniform_weight,
}
"""What makes the integers of a weight, by the class of its quantizer."""


def int8_parts(integers: Tensor) -> list[Tensor]:
    """One int8 tensor, or the fewest whose sum the integers are: from -255 to 254 two, with 255 three."""
    low = integers.clamp(-128, 127)
    rest = integers - low
    return [low.to(torch.int8), *(int8_parts(rest) if bool(rest.any()) else [])]


def with_sums(op: QuantOp, integers: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights ``code - 128`` and, as :data:`SUMS` more outputs, ones and zeros; and what each integer lacks, ``128 - z``, (out,)."""
    params = op.quantizer('weight').params
    assert params is not None
    above = (128 - params['zero_point'].reshape(-1)).expand(len(integers)).to(integers.dtype)
    more = integers.new_zeros(SUMS, *integers.shape[1:])
    more[0] = 1
    return torch.cat([integers - above.view(-1, *[1] * (integers.ndim - 1)), more]).to(torch.int8), above


def with_more(values: Tensor, value: float) -> Tensor:
    """Values of outputs, (out,), with those of :data:`SUMS` more."""
    return torch.cat([values, values.new_full((SUMS,), value)])


def int8_path(parts: int) -> str:
    """What the report says of weights in so many parts."""
    return 'int8' + ('' if parts == 1 else f', weight in {["two", "three"][parts - 2]} parts')


def has_onednn(device: torch.device) -> bool:
    """Whether integer products of oneDNN are there and exact (without VNNI their 16-bit sums saturate)."""
    return device.type == 'cpu' and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can run: on a GPU of NVIDIA's with tensor cores for int8, where the package is."""
    return (device.type == 'cuda' and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
            and find_spec('triton') is not None)
