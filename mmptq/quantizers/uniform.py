"""Uniform affine quantization, per tensor, per channel or per head."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Params, Quantizer, in_chunks


def encode_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Codes ``clip(round(x / s) + z, 0, N - 1)``, int16. The division is a product with 1/s, as in torch's kernels."""
    return (torch.round(x * scale.reciprocal()) + zero_point).clamp_(0, levels - 1).to(torch.int16)


def decode_uniform(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values ``s (codes - z)``."""
    return (codes - zero_point).to(scale.dtype) * scale


class UniformQuantizer(Quantizer):
    """``U(x; s, z) = s (clip(round(x/s) + z, 0, N-1) - z)`` with an integer zero point z; zero is always exact.

    Parameters: ``scale`` (float, positive) and ``zero_point`` (int32).
    """

    param_names = ('scale', 'zero_point')
    scale: Tensor | None
    zero_point: Tensor | None

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:  # type: ignore[override]
        return encode_uniform(x, scale, zero_point, self.levels)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:  # type: ignore[override]
        return decode_uniform(codes, scale, zero_point)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:  # type: ignore[override]
        # Four passes over a piece in the cache; torch's fused kernels are not vectorized and take many times as long.
        inverse = scale.reciprocal()
        low, high = -zero_point.to(scale.dtype), (self.levels - 1 - zero_point).to(scale.dtype)
        bounds = (float(low), float(high)) if scale.ndim == 0 and scale.device.type == 'cpu' else (low, high)

        def chain(piece: Tensor, out: Tensor) -> None:
            torch.mul(piece, inverse, out=out).round_().clamp_(*bounds).mul_(scale)

        return in_chunks(chain, x, split=self.axis != -x.ndim)

    def range_params(self, low: Tensor, high: Tensor) -> Params:
        """Scale and zero point whose grid covers ``[min(low, 0), max(high, 0)]``.

        A range without width (a constant zero) gets scale 1, which keeps zero exact.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (self.levels - 1)
        scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
        zero_point = torch.round(-low / scale).clamp_(0, self.levels - 1)
        return {'scale': scale, 'zero_point': zero_point.to(torch.int32)}

    def candidates(self, values: Tensor, count: int) -> Params:
        """Ranges from the extremes, and zero, inwards to the 0.1 and 0.9 quantiles, denser inside; each end by itself."""
        steps = max(2, math.isqrt(count))
        fractions = torch.linspace(1, 0, steps, dtype=values.dtype, device=values.device).square()[:, None]
        low, inner_low, inner_high, high = quantiles(values, (0, 0.1, 0.9, 1))
        lows = torch.lerp(inner_low, low, fractions)  # (steps, groups)
        highs = torch.lerp(inner_high, high, fractions)
        return self.range_params(lows.repeat_interleave(steps, 0), highs.repeat(steps, 1))


def quantiles(values: Tensor, fractions: tuple[float, ...]) -> Tensor:
    """Quantiles of each row, (fractions, rows). Long rows are thinned evenly, but extremes (0 and 1) are exact."""
    thinned = values[:, ::max(1, values.shape[1] // 2**16)]
    inner = torch.quantile(thinned, torch.tensor(fractions, dtype=values.dtype, device=values.device), dim=1)
    exact = {0.0: values.amin(1), 1.0: values.amax(1)}
    return torch.stack([exact.get(fraction, row) for fraction, row in zip(fractions, inner, strict=True)])
