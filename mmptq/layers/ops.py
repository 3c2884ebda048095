"""Quantized operations: linear, convolution and matrix product look alike to a search.

Each is ``compute(*operands)``: change one operand's quantizer, keep the rest, compare the output.
"""
from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..quantizers import Quantizer


class QuantOp(nn.Module):
    """An operation whose operands pass through a quantizer each.

    The operands are the activations, followed by the weight if there is one. ``roles`` names them; the quantizer of role
    ``r`` is the child ``r_quantizer``. ``output_axes`` is the axis of the output that each value of a per-channel or
    per-head quantizer decides alone.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    output_axes: ClassVar[dict[str, int]]
    sites: dict[str, str]

    def set_quantizers(self, sites: dict[str, str], quantizers: dict[str, Quantizer]) -> None:
        """Gives every role its site (see :data:`mmptq.backbones.SITES`) and its quantizer."""
        self.sites = sites
        for role in self.roles:
            self.add_module(f'{role}_quantizer', quantizers[role])

    def quantizer(self, role: str) -> Quantizer:
        """The quantizer of an operand."""
        quantizer = self.get_submodule(f'{role}_quantizer')
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by role, in the order of the operands."""
        return {role: self.quantizer(role) for role in self.roles}

    def activations(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The operands that depend on the data, as :meth:`compute` takes them."""
        return inputs

    def operands(self, *activations: Tensor) -> tuple[Tensor, ...]:
        """All operands, in the order of ``roles``."""
        return activations

    def compute(self, *operands: Tensor) -> Tensor:
        """The operation itself, on operands that are quantized or not."""
        raise NotImplementedError

    def sample(self, activations: tuple[Tensor, ...], rows: int, generator: Generator) -> tuple[Tensor, ...]:
        """About ``rows`` random rows of the activations, on which the operation gives rows of its output."""
        raise NotImplementedError

    def quantized(self, *activations: Tensor) -> Tensor:
        """The operation on quantized operands."""
        operands = self.operands(*activations)
        return self.compute(*(self.quantizer(role)(operand) for role, operand in zip(self.roles, operands, strict=True)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.quantized(*self.activations(*inputs))


def pick(count: int, size: int, generator: Generator, device: torch.device) -> Tensor:
    """``min(count, size)`` different indices below ``size``, seeded by a CPU generator, ascending."""
    indices = torch.randperm(size, generator=generator)[:count]
    return indices.sort().values.to(device)


class QuantLinear(QuantOp, nn.Linear):
    """``nn.Linear`` with quantized input and weight; parameter names are those of ``nn.Linear``."""

    kind = 'linear'
    roles = ('input', 'weight')
    output_axes = {'weight': -1}
    weight_axis = -2

    @classmethod
    def from_float(cls, linear: nn.Linear) -> QuantLinear:
        """The same layer with the same (shared) parameters, quantizers to be set."""
        with torch.device('meta'):
            op = cls(linear.in_features, linear.out_features, linear.bias is not None)
        op.weight, op.bias = linear.weight, linear.bias
        op.train(linear.training)
        return op

    def operands(self, *activations: Tensor) -> tuple[Tensor, ...]:
        return activations[0], self.weight

    def compute(self, *operands: Tensor) -> Tensor:
        return F.linear(operands[0], operands[1], self.bias)

    def sample(self, activations: tuple[Tensor, ...], rows: int, generator: Generator) -> tuple[Tensor, ...]:
        x = activations[0].reshape(-1, activations[0].shape[-1])  # (tokens, in)
        return (x[pick(rows, x.shape[0], generator, x.device)],)


class QuantConv2d(QuantOp, nn.Conv2d):
    """``nn.Conv2d`` with quantized input and weight; parameter names are those of ``nn.Conv2d``.

    The input is padded before it is quantized. Zero is exact in every quantizer used here, so this changes nothing, and
    a sample of receptive fields is a valid input of :meth:`compute`.
    """

    kind = 'conv'
    roles = ('input', 'weight')
    output_axes = {'weight': -3}
    weight_axis = -4

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> QuantConv2d:
        """The same layer with the same (shared) parameters, quantizers to be set."""
        with torch.device('meta'):
            op = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
                     conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode)  # type: ignore[arg-type]
        op.weight, op.bias = conv.weight, conv.bias
        op.train(conv.training)
        return op

    def activations(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        padding = self._reversed_padding_repeated_twice
        if not any(padding):
            return inputs
        return (F.pad(inputs[0], padding, mode='constant' if self.padding_mode == 'zeros' else self.padding_mode),)

    def operands(self, *activations: Tensor) -> tuple[Tensor, ...]:
        return activations[0], self.weight

    def compute(self, *operands: Tensor) -> Tensor:
        return F.conv2d(operands[0], operands[1], self.bias, self.stride, 0, self.dilation, self.groups)

    def sample(self, activations: tuple[Tensor, ...], rows: int, generator: Generator) -> tuple[Tensor, ...]:
        x = activations[0]
        height, width = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        # (batch, channels, out_h, out_w, height, width): a view of all receptive fields
        fields = x.unfold(2, height, self.stride[0]).unfold(3, width, self.stride[1])
        batch, _, out_h, out_w = fields.shape[:4]
        index = pick(rows, batch * out_h * out_w, generator, x.device)
        image, place = index // (out_h * out_w), index % (out_h * out_w)
        return (fields[image, :, place // out_w, place % out_w],)  # (rows, channels, height, width)


class QuantMatMul(QuantOp):
    """Product of two activations ``(..., heads, rows, inner) @ (..., heads, inner, columns)``."""

    kind = 'matmul'
    roles = ('left', 'right')
    output_axes = {'left': -3, 'right': -3}

    def compute(self, *operands: Tensor) -> Tensor:
        return torch.matmul(operands[0], operands[1])

    def sample(self, activations: tuple[Tensor, ...], rows: int, generator: Generator) -> tuple[Tensor, ...]:
        left, right = activations
        heads, length = left.shape[-3:-1]
        left = left.reshape(-1, heads, *left.shape[-2:])  # (windows, heads, length, inner)
        right = right.reshape(-1, heads, *right.shape[-2:])
        windows = pick(max(1, -(-rows // length)), left.shape[0], generator, left.device)
        inside = pick(rows, length, generator, left.device)
        return left[windows][:, :, inside], right[windows]
