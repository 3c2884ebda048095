"""Quantized operations: linear, convolution and matrix product look alike to a search.

Each is ``compute(*operands)``: change one operand's quantizer, keep the rest, compare
the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..quantizers import Quantizer
from ..quantizers.base import is_traced
from .rescale import GeluShift, Rescale


@dataclass(frozen=True)
class Places:
    """Where an operation's activations are sampled.

    Attributes:
        index: Indices, as the kind of operation needs them.
        counts: How many rows each sampled row stands for, (rows,); None if all stand
            for the same number.
    """

    index: tuple[Tensor, ...]
    counts: Tensor | None = None


class QuantOp(nn.Module):
    """An operation whose operands pass through a quantizer each.

    The operands are the activations, followed by the weight if there is one. ``roles``
    names them; the quantizer of role ``r`` is the child ``r_quantizer``.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    streams = False
    """Whether sums over all rows of its input are cheap, so that its weight can be
    searched on all of them.
    """
    sites: dict[str, str]

    def set_quantizers(
        self,
        sites: dict[str, str],
        quantizers: dict[str, Quantizer],
        heads: int | None = None,
    ) -> None:
        """Gives every role its site (see :data:`mmptq.backbones.SITES`) and its
        quantizer.

        ``heads`` is how many heads a product has, where that is known.
        """
        self.sites = sites
        for role in self.roles:
            quantizer = quantizers[role]
            if role != 'weight':
                quantizer.groups = heads
            elif quantizer.axis is not None:
                quantizer.groups = self.get_parameter('weight').shape[quantizer.axis]
            self.add_module(f'{role}_quantizer', quantizer)

    def quantizer(self, role: str) -> Quantizer:
        """The quantizer of an operand."""
        return self._modules[f'{role}_quantizer']  # type: ignore[return-value]

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

    def factors(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """The operation as a product ``(left + offset) @ right^T`` plus a constant, on
        operands made from :meth:`take`.

        Returns:
            left (batch, heads, rows, inner) and right (batch, heads, columns, inner);
            the first operand is in the first, the second in the second, value by value.
        """
        raise NotImplementedError

    def offset(self) -> Tensor | None:
        """What is added to the left factor after it is quantized, if anything."""
        return None

    def float_forward(self, *inputs: Tensor) -> Tensor:
        """What the float module computes."""
        raise NotImplementedError

    def places(
        self, activations: tuple[Tensor, ...], rows: int, generator: Generator
    ) -> Places:
        """About ``rows`` random rows of the activations."""
        raise NotImplementedError

    def take(
        self, activations: tuple[Tensor, ...], places: Places | None = None
    ) -> tuple[Tensor, ...]:
        """The rows at some places (by default all), on which :meth:`compute` gives rows
        of the operation's output.
        """
        raise NotImplementedError

    def quantized(self, *activations: Tensor) -> Tensor:
        """The operation on quantized operands."""
        operands = self.operands(*activations)
        return self.compute(
            *(
                self.quantizer(role)(operand)
                for role, operand in zip(self.roles, operands, strict=True)
            )
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        if is_traced():
            return self.quantized(*self.activations(*inputs))
        # an attention's mode looks for products of its own, at a cost for every call
        with torch._C.DisableTorchFunction():
            return self.quantized(*self.activations(*inputs))


def pick(count: int, size: int, generator: Generator, device: torch.device) -> Tensor:
    """``min(count, size)`` different indices below ``size``, seeded by a CPU generator,
    ascending.
    """
    indices = torch.randperm(size, generator=generator)[:count]
    return indices.sort().values.to(device)


def prefer_large(
    norms: Tensor, count: int, offset: float, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A systematic sample of rows, half of it in proportion to their squares: a few
    massive rows may make most of an error.

    Args:
        norms: Of the rows, (..., rows).
        count: Size of the sample; a massive row may be there several times.
        offset: Where it starts, from 0 to 1.
        counts: What each row counts, (..., rows), if not the same.

    Returns:
        Indices, ascending, and what each row of the sample counts, (..., count): the
        weighted sum of anything over the sample is on the average its sum over all
        rows. All rows, if there are not more than ``count``.
    """
    present = torch.ones_like(norms) if counts is None else counts
    if count >= norms.shape[-1]:
        return (
            torch.arange(norms.shape[-1], device=norms.device).expand(norms.shape),
            present,
        )
    plain, energy = present.double(), present.double() * norms.double().square()
    least = torch.finfo(torch.float64).tiny
    probability = plain / plain.sum(-1, keepdim=True) + energy / energy.sum(
        -1, keepdim=True
    ).clamp(min=least)
    probability /= probability.sum(-1, keepdim=True)
    points = (
        ((torch.arange(count, dtype=torch.float64) + offset) / count)
        .to(norms.device)
        .expand(*norms.shape[:-1], -1)
        .contiguous()
    )
    index = torch.searchsorted(probability.cumsum(-1), points).clamp_(
        max=norms.shape[-1] - 1
    )
    return index, (plain / (count * probability)).gather(-1, index).to(norms.dtype)


class QuantLinear(QuantOp, nn.Linear):
    """``nn.Linear`` with quantized input and weight; parameter names are those of
    ``nn.Linear``.

    With a child ``rescale`` its operands are the input and the weight as that changes
    them.
    """

    kind = 'linear'
    roles = ('input', 'weight')
    streams = True
    weight_axis = -2
    answers_for_weight = (
        True  # an attention that reads the weight itself gets this layer's output
    )
    rescale: Rescale | GeluShift | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.rescale = None

    @classmethod
    def from_float(cls, linear: nn.Linear) -> QuantLinear:
        """The same layer with the same (shared) parameters, quantizers to be set."""
        with torch.device('meta'):
            op = cls(linear.in_features, linear.out_features, linear.bias is not None)
        op.weight, op.bias = linear.weight, linear.bias
        op.train(linear.training)
        return op

    def to_float(self) -> nn.Linear:
        """The float layer with the same (shared) parameters."""
        with torch.device('meta'):
            linear = nn.Linear(
                self.in_features, self.out_features, self.bias is not None
            )
        linear.weight, linear.bias = self.weight, self.bias
        linear.train(self.training)
        return linear

    def operands(self, *activations: Tensor) -> tuple[Tensor, ...]:
        if self.rescale is None:
            return activations[0], self.weight
        return self.rescale(activations[0]), self.rescale.weight(self.weight)

    def compute(self, *operands: Tensor) -> Tensor:
        x, weight = operands
        return F.linear(x, weight, self.corrected_bias(weight))

    def corrected_bias(self, weight: Tensor) -> Tensor | None:
        """The bias that makes up for the shift of the input; ``weight`` is the second
        operand, quantized or not.
        """
        if self.rescale is None:
            return self.bias
        offset, correction = self.rescale.offset(), self.rescale.correction(self.weight)
        if offset is not None:
            correction = weight.sum(1) * offset
        if correction is None or self.bias is None:
            return self.bias if correction is None else correction
        return self.bias + correction

    def factors(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        return operands[0][None, None], operands[1][None, None]

    def offset(self) -> Tensor | None:
        return None if self.rescale is None else self.rescale.offset()

    def quantized(self, *activations: Tensor) -> Tensor:
        if self.rescale is None:
            return super().quantized(*activations)
        x = self.quantizer('input')(
            activations[0], self.rescale
        )  # in one go, piece by piece
        return self.compute(
            x, self.quantizer('weight')(self.rescale.weight(self.weight))
        )

    def float_forward(self, *inputs: Tensor) -> Tensor:
        # an attention's mode would take it for a use of the weight without the layer
        with torch._C.DisableTorchFunction():
            return nn.Linear.forward(self, *inputs)

    def places(
        self, activations: tuple[Tensor, ...], rows: int, generator: Generator
    ) -> Places:
        """Tokens, the large ones more often: a few massive activations may make most of
        the error.
        """
        norms = torch.linalg.vector_norm(activations[0], dim=-1).view(-1)
        index, counts = prefer_large(
            norms, rows, float(torch.rand((), generator=generator))
        )
        return Places((index,), counts)

    def take(
        self, activations: tuple[Tensor, ...], places: Places | None = None
    ) -> tuple[Tensor, ...]:
        x = activations[0].reshape(-1, activations[0].shape[-1])  # (tokens, in)
        return (x if places is None else x[places.index[0]],)


class QuantConv2d(QuantOp, nn.Conv2d):
    """``nn.Conv2d`` with quantized input and weight; parameter names are those of
    ``nn.Conv2d``.

    The input is padded before it is quantized. Zero is exact in every quantizer used
    here, so this changes nothing, and a sample of receptive fields is a valid input of
    :meth:`compute`.
    """

    kind = 'conv'
    roles = ('input', 'weight')
    weight_axis = -4

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> QuantConv2d:
        """The same layer with the same (shared) parameters, quantizers to be set."""
        with torch.device('meta'):
            op = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                conv.groups,
                conv.bias is not None,
                conv.padding_mode,
            )
        op.weight, op.bias = conv.weight, conv.bias
        op.train(conv.training)
        return op

    def to_float(self) -> nn.Conv2d:
        """The float layer with the same (shared) parameters."""
        with torch.device('meta'):
            conv = nn.Conv2d(
                self.in_channels,
                self.out_channels,
                self.kernel_size,  # type: ignore[arg-type]
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.dilation,  # type: ignore[arg-type]
                self.groups,
                self.bias is not None,
                self.padding_mode,
            )
        conv.weight, conv.bias = self.weight, self.bias
        conv.train(self.training)
        return conv

    def activations(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        padding = self._reversed_padding_repeated_twice
        if not any(padding):
            return inputs
        return (
            F.pad(
                inputs[0],
                padding,
                mode='constant' if self.padding_mode == 'zeros' else self.padding_mode,
            ),
        )

    def operands(self, *activations: Tensor) -> tuple[Tensor, ...]:
        return activations[0], self.weight

    def compute(self, *operands: Tensor) -> Tensor:
        return F.conv2d(
            operands[0],
            operands[1],
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )

    def factors(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = operands
        taken = x[
            ..., :: self.dilation[0], :: self.dilation[1]
        ]  # (rows, channels, kernel height, kernel width)
        left = taken.reshape(len(x), self.groups, -1).transpose(0, 1)
        return (
            left[None],
            weight.reshape(self.groups, self.out_channels // self.groups, -1)[None],
        )

    @property
    def streams(self) -> bool:  # type: ignore[override]
        """True where receptive fields do not overlap, as in a patch embedding."""
        return all(
            k <= s for k, s in zip(self.kernel_size, self.stride, strict=True)
        ) and self.dilation == (1, 1)

    def float_forward(self, *inputs: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, *inputs)

    def places(
        self, activations: tuple[Tensor, ...], rows: int, generator: Generator
    ) -> Places:
        x = activations[0].square().sum(1, keepdim=True)
        size = [
            d * (k - 1) + 1
            for d, k in zip(self.dilation, self.kernel_size, strict=True)
        ]
        norms = (
            F.avg_pool2d(x, size, self.stride).sqrt().flatten()
        )  # of the receptive fields, but for a factor
        index, counts = prefer_large(
            norms, rows, float(torch.rand((), generator=generator))
        )
        return Places((index,), counts)

    def take(
        self, activations: tuple[Tensor, ...], places: Places | None = None
    ) -> tuple[Tensor, ...]:
        fields = self._fields(activations[0])
        batch, _, out_h, out_w = fields.shape[:4]
        index = (
            torch.arange(batch * out_h * out_w, device=fields.device)
            if places is None
            else places.index[0]
        )
        image, place = index // (out_h * out_w), index % (out_h * out_w)
        return (
            fields[image, :, place // out_w, place % out_w],
        )  # (rows, channels, height, width)

    def _fields(self, x: Tensor) -> Tensor:
        """All receptive fields, a view of shape (batch, channels, out_h, out_w, height,
        width).
        """
        height, width = (
            d * (k - 1) + 1
            for d, k in zip(self.dilation, self.kernel_size, strict=True)
        )
        return x.unfold(2, height, self.stride[0]).unfold(3, width, self.stride[1])


class QuantMatMul(QuantOp):
    """Product of two activations ``(..., heads, rows, inner) @ (..., heads, inner,
    columns)``.
    """

    kind = 'matmul'
    roles = ('left', 'right')

    def compute(self, *operands: Tensor) -> Tensor:
        return torch.matmul(operands[0], operands[1])

    def factors(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        return operands[0], operands[1].transpose(-1, -2)

    def float_forward(self, *inputs: Tensor) -> Tensor:
        return torch.matmul(*inputs)

    def places(
        self, activations: tuple[Tensor, ...], rows: int, generator: Generator
    ) -> Places:
        """Whole windows, and rows and half as many columns of their outputs."""
        left, right = activations
        length = left.shape[-2]
        windows = pick(
            max(1, -(-rows // length)), left.shape[:-3].numel(), generator, left.device
        )
        inside = pick(rows, length, generator, left.device)
        return Places(
            (
                windows,
                inside,
                pick(max(1, rows // 2), right.shape[-1], generator, left.device),
            )
        )

    def take(
        self, activations: tuple[Tensor, ...], places: Places | None = None
    ) -> tuple[Tensor, ...]:
        left, right = (
            x.reshape(-1, *x.shape[-3:]) for x in activations
        )  # (windows, heads, length, inner)
        if places is None:
            return left, right
        windows, inside, columns = places.index
        return left[windows][:, :, inside], right[windows][..., columns]
