"""Changes of scale and shift between an activation and the weight that reads it, which
leave the function as it is.

They are applied where the linear layer reads its input, not in the LayerNorm before it:
Swin pads with zeros after the norm, and a padded token must become ``0 / r - b`` like
any other. Folding them into the norm, as the official codes do, changes it. In integer
arithmetic they cost nothing: the input's belongs to its quantization, the rest to
weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizationError
from ..quantizers import Calibrated, Params

GELU_MINIMUM = 0.16997124254703522
"""Minus the minimum of GELU: ``gelu(x) + GELU_MINIMUM`` is not negative."""


class Rescale(Calibrated):
    """``x' = x / r - b``, ``W' = W diag(r)``, ``bias' = bias + W' b`` (RepQ-ViT; AdaLog
    after LayerNorm; NormQuant).

    Parameters: ``scale`` (r) and ``shift`` (b), (in,). Where the float weight is gone,
    in a packed model, also ``gain``: its ``W' b``, (out,).
    """

    param_names = ('scale', 'shift')
    scale: Tensor | None
    shift: Tensor | None
    gain: Tensor | None

    def __init__(
        self, in_features: int | None = None, out_features: int | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer('gain', None)

    def param_ndim(self) -> int:
        return 1

    def fault(self, name: str, value: Tensor) -> str | None:
        """As in :class:`Calibrated`; also another length than that of the layer's
        input, or output for ``gain``.
        """
        length = self.out_features if name == 'gain' else self.in_features
        if length is not None and value.shape != (length,):
            return f'has the shape {tuple(value.shape)}, not {(length,)}'
        return super().fault(name, value)

    def set(self, **params: Tensor) -> None:
        super().set(**params)
        self.gain = None

    def forward(self, x: Tensor) -> Tensor:
        return (
            x
            if self.scale is None or self.shift is None
            else torch.addcmul(-self.shift, x, self.scale.reciprocal())
        )

    def weight(self, weight: Tensor) -> Tensor:
        """``W'`` of a weight (out, in)."""
        return weight if self.scale is None else weight * self.scale

    def offset(self) -> Tensor | None:
        """What the rounded weight sees beside ``x'``, if anything."""
        return None

    def correction(self, weight: Tensor) -> Tensor | None:
        """What the bias gains, from the float weight ``W`` (out, in)."""
        if self.scale is None or self.shift is None:
            return None
        return (
            F.linear(self.scale * self.shift, weight)
            if self.gain is None
            else self.gain
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        gain = state_dict.get(f'{prefix}gain')
        fault = None if gain is None else self.fault('gain', gain)
        if fault:
            raise QuantizationError(f'{prefix}gain {fault}, as the layer needs it')
        self.gain = (
            None if gain is None else torch.empty_like(gain, device=self.place.device)
        )
        super()._load_from_state_dict(state_dict, prefix, *args)


class GeluShift(Calibrated):
    """AdaLog's bias reparameterisation: ``x' = x + c``, ``bias' = bias - c W_q 1``,
    with the quantized weight ``W_q``.

    Parameters: ``shift`` (c), ().
    """

    param_names = ('shift',)
    shift: Tensor | None

    def __init__(
        self, in_features: int | None = None, out_features: int | None = None
    ) -> None:
        super().__init__()

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
"""The least r: a channel that hardly varied in calibration may do so later, and 1/r is
what it is then multiplied by.
"""

RESCALES: dict[str, type[Rescale] | type[GeluShift]] = {
    'per_channel': Rescale,
    'gelu': GeluShift,
}
"""By the value of ``rescale`` in a recipe's quantizer."""


def per_channel_rescale(
    params: Params, zero: Tensor, alpha: float = 0.0, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """r and b that turn a quantizer per channel into one per tensor (RepQ-ViT; AdaLog,
    after LayerNorm; NormQuant with shift).

    ``S = mean s``, ``Z = round(mean z)``, ``r = (s / S)^(1 - alpha) / w^alpha``, ``b =
    lo / r - LO`` with ``lo = -z s`` and ``LO = -Z S``. With alpha = 0, RepQ-ViT's, the
    weight has no say.

    Args:
        params: ``scale`` and ``zero_point`` of the uniform quantizer of each channel,
            (in,).
        zero: Channels that are always zero, (in,), bool: they have no scale, and keep r
            = 1.
        alpha: How much of the difference between channels is left to the weight, 0 to
            1.
        columns: Scales of the weight's columns, (in,), for an alpha that is not 0.
    """
    scale, zero_point = params['scale'], params['zero_point'].to(params['scale'].dtype)
    if bool(zero.all()):
        return torch.ones_like(scale), torch.zeros_like(scale)
    mean_scale, mean_zero = scale[~zero].mean(), zero_point[~zero].mean().round()
    scale = torch.where(zero, mean_scale, scale).clamp(min=SMALLEST * float(mean_scale))
    zero_point = torch.where(zero, mean_zero, zero_point)
    r = _shared(scale / mean_scale, zero, alpha, columns)
    return r, -zero_point * scale / r + mean_zero * mean_scale


def largest_rescale(largest: Tensor, alpha: float, columns: Tensor) -> Tensor:
    """r of NormQuant without shift: only channels above the average are made smaller.

    ``C = mean c``, ``c <- max(c, C)``, ``r = max(1, (c / C)^(1 - alpha) / w^alpha)``.

    Args:
        largest: ``c``, the largest magnitude in each channel, (in,).
        alpha: As above.
        columns: As above.
    """
    mean = largest.mean()
    if not float(mean):
        return torch.ones_like(largest)
    return _shared(
        torch.maximum(largest, mean) / mean, largest == 0, alpha, columns
    ).clamp(min=1)


def _shared(
    ratio: Tensor, zero: Tensor, alpha: float, columns: Tensor | None
) -> Tensor:
    """``ratio^(1 - alpha) / w^alpha``, w the columns' scales over their mean; 1 for
    channels that are always zero.
    """
    if not alpha or columns is None:
        return ratio
    mean = columns.mean()
    weight = (
        (columns / mean).clamp(min=SMALLEST)
        if float(mean)
        else torch.ones_like(columns)
    )  # a column of zeros has no scale
    return torch.where(
        zero, torch.ones_like(ratio), ratio.pow(1 - alpha) / weight.pow(alpha)
    )
