"""Changes of scale and shift between an activation and the weight that reads it, which leave the function as it is.

They are applied where the linear layer reads its input, not in the LayerNorm before it: Swin pads with zeros after the norm,
and a padded token must become ``0 / r - b`` like any other. Folding them into the norm, as the official codes do, changes it.
In integer arithmetic they cost nothing: the input's belongs to its quantization, the rest to weight and bias.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizers import Calibrated, Params

GELU_MINIMUM = 0.16997124254703522
"""Minus the minimum of GELU: ``gelu(x) + GELU_MINIMUM`` is not negative."""


class Rescale(Calibrated):
    """``x' = x / r - b``, ``W' = W diag(r)``, ``bias' = bias + W' b`` (RepQ-ViT; AdaLog after LayerNorm; NormQuant).

    Parameters: ``scale`` (r) and ``shift`` (b), (in,).
    """

    param_names = ('scale', 'shift')
    scale: Tensor | None
    shift: Tensor | None

    def param_ndim(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale is None or self.shift is None else torch.addcmul(-self.shift, x, self.scale.reciprocal())

    def weight(self, weight: Tensor) -> Tensor:
        """``W'`` of a weight (out, in)."""
        return weight if self.scale is None else weight * self.scale

    def offset(self) -> Tensor | None:
        """What the rounded weight sees beside ``x'``, if anything."""
        return None

    def correction(self, weight: Tensor) -> Tensor | None:
        """What the bias gains, from the float weight ``W`` (out, in)."""
        return None if self.scale is None or self.shift is None else F.linear(self.scale * self.shift, weight)


class GeluShift(Calibrated):
    """AdaLog's bias reparameterisation: ``x' = x + c``, ``bias' = bias - c W_q 1``, with the quantized weight ``W_q``.

    Parameters: ``shift`` (c), ().
    """

    param_names = ('shift',)
    shift: Tensor | None

    def param_ndim(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return x if self.shift is None else x + self.shift

    def weight(self, weight: Tensor) -> Tensor:
        """``W'`` of a weight: itself."""
        return weight

    def offset(self) -> Tensor | None:
        """What the rounded weight sees beside ``x'``: -c."""
        return None if self.shift is None else -self.shift

    def correction(self, weight: Tensor) -> Tensor | None:
        """What the bias gains from the float weight: nothing."""
        return None


SMALLEST = 1e-4
"""The least r: a channel that hardly varied in calibration may do so later, and 1/r is what it is then multiplied by."""

RESCALES: dict[str, type[Rescale] | type[GeluShift]] = {'per_channel': Rescale, 'gelu': GeluShift}
"""By the value of ``rescale`` in a recipe's quantizer."""


def per_channel_rescale(params: Params, zero: Tensor) -> tuple[Tensor, Tensor]:
    """r and b that turn a quantizer per channel into one per tensor (RepQ-ViT; AdaLog, after LayerNorm).

    ``S = mean s``, ``Z = round(mean z)``, ``r = s / S``, ``b = lo / r - LO`` with ``lo = -z s`` and ``LO = -Z S``.

    Args:
        params: ``scale`` and ``zero_point`` of the uniform quantizer of each channel, (in,).
        zero: Channels that are always zero, (in,), bool: they have no scale, and keep r = 1.
    """
    scale, zero_point = params['scale'], params['zero_point'].to(params['scale'].dtype)
    if bool(zero.all()):
        return torch.ones_like(scale), torch.zeros_like(scale)
    mean_scale, mean_zero = scale[~zero].mean(), zero_point[~zero].mean().round()
    scale = torch.where(zero, mean_scale, scale).clamp(min=SMALLEST * float(mean_scale))
    zero_point = torch.where(zero, mean_zero, zero_point)
    r = scale / mean_scale
    return r, -zero_point * scale / r + mean_zero * mean_scale
