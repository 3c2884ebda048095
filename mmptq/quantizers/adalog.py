"""AdaLog: quantization to an adaptive logarithmic base (Wu et al., AdaLog, ECCV 2024)."""
from __future__ import annotations

import torch
from torch import Tensor

from .base import Params, Quantizer, in_chunks
from .uniform import quantiles

R = 37
"""Denominator of the base's exponent, a prime: bases are ``2^(q/R)``."""

Q_RANGE = range(10, 138)
"""The numerators that are searched. q = 37 is log2; log-sqrt2 is q/R = 1/2, that is q = 18.5."""

GELU_MINIMUM = 0.16997124254703522
"""Minus the minimum of GELU: ``gelu(x) + GELU_MINIMUM`` is not negative."""


def encode_adalog(x: Tensor, scale: Tensor, q: Tensor, levels: int) -> Tensor:
    """Codes ``k = round(-log2(clip(x/s, 0, 1)) r/q)``, cut at N, the code of exact zero. int32.

    The paper clips at 1e-15, so that zero becomes ``2^-49.8 s`` where the codes reach that far (8 bits); here it stays zero.
    """
    k = (x / scale).clamp_(0, 1).log2_().mul_(-R / q).round_()
    return k.clamp_(max=levels).int()


def decode_table(q: Tensor, levels: int) -> tuple[Tensor, Tensor, int]:
    """The two look-up tables of integer inference.

    ``T1[k] = floor(k q / r)`` is a shift, ``T2[k] = round(G 2^(-((k q) mod r)/r))`` an integer in G/2..G; the value of
    code k is ``s 2^(-T1[k]) T2[k] / G``.

    Args:
        q: Numerator of the base's exponent, shape ().
        levels: N.

    Returns:
        T1 and T2 as float64 tensors of N integers, and G = 2N - 2.
    """
    steps = torch.arange(levels, dtype=torch.float64, device=q.device) * q.to(torch.float64)
    shift = torch.floor(steps / R)
    largest = 2 * levels - 2
    return shift, torch.round(largest * torch.exp2(-(steps - shift * R) / R)), largest


def decode_values(scale: Tensor, q: Tensor, levels: int, strict: bool) -> Tensor:
    """The value of every code, in the scale's dtype: N values and a zero (``strict``: N - 1 values and zeros)."""
    shift, mantissa, largest = decode_table(q, levels)
    values = scale.to(torch.float64) * torch.exp2(-shift) * mantissa / largest
    values = torch.cat([values, values.new_zeros(1)])
    if strict:
        values[levels - 1] = 0
    return values.to(scale.dtype)


class AdaLogQuantizer(Quantizer):
    """Logarithmic quantization with base ``2^(q/37)`` of values in ``[0, scale]``.

    Codes at or beyond N are zero, so there are N + 1 levels; ``strict`` makes the last code zero and keeps to N levels,
    as b bits hold. Log2 is ``q=37``, log-sqrt2 ``q=18.5``.

    Args:
        bits: Width of a code, 2 to 8.
        strict: Exactly 2^bits levels, zero among them.
        shift: Constant c added before quantization and subtracted after it: the values lie in ``[-c, scale - c]``.
            After GELU c is :data:`GELU_MINIMUM`.
        fixed_scale: The scale, if it is known (1 for probabilities); not searched then.
        fixed_q: The base's numerator, if it is not to be adapted.

    Parameters: ``scale`` (float, shape ()) and ``q`` (float, shape ()).
    """

    param_names = ('scale', 'q')
    scale: Tensor | None
    q: Tensor | None

    def __init__(self, bits: int, strict: bool = False, shift: float = 0.0, fixed_scale: float | None = None,
                 fixed_q: float | None = None) -> None:
        super().__init__(bits)
        self.strict = strict
        self.shift = shift
        self.fixed_scale = fixed_scale
        self.fixed_q = fixed_q

    def encode(self, x: Tensor, scale: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        # The last code is the only zero in strict mode, else the one beyond the last.
        return encode_adalog(x + self.shift if self.shift else x, scale, q, self.levels - self.strict).to(torch.int16)

    def decode(self, codes: Tensor, scale: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        values = decode_values(scale, q, self.levels, self.strict) - self.shift
        return values.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def fake_quantize(self, x: Tensor, scale: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        values = decode_values(scale, q, self.levels, self.strict) - self.shift
        zero_code = self.levels - self.strict

        def chain(piece: Tensor, out: Tensor) -> None:
            codes = encode_adalog(piece + self.shift if self.shift else piece, scale, q, zero_code)
            if out.is_contiguous() and codes.is_contiguous() and out.dtype == values.dtype:
                torch.index_select(values, 0, codes.view(-1), out=out.view(-1))
            else:
                out.copy_(values[codes])

        return in_chunks(chain, x)

    def range_params(self, low: Tensor, high: Tensor) -> Params:
        """The scale that covers ``high`` unless it is fixed, with base 2 unless that is; nothing below ``-shift`` is covered."""
        scale = high + self.shift
        scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
        if self.fixed_scale is not None:
            scale = torch.full_like(scale, self.fixed_scale)
        return {'scale': scale, 'q': torch.full_like(scale, R if self.fixed_q is None else self.fixed_q)}

    def candidates(self, values: Tensor, count: int) -> Params:
        """A scan of bases; where the scale is not fixed, with scales from the largest value inwards to the 0.9 quantile."""
        inner, high = quantiles(values, (0.9, 1))  # (1,) each
        steps = 1 if self.fixed_scale is not None else 8
        fractions = torch.linspace(1, 0, steps, dtype=values.dtype, device=values.device).square()[:, None]
        scales = self.range_params(high, torch.lerp(inner, high, fractions))['scale']
        every = max(1, len(Q_RANGE) * steps // count)  # log2 is always among them
        bases = [self.fixed_q] if self.fixed_q is not None else Q_RANGE[(R - Q_RANGE.start) % every::every]
        q = torch.tensor(bases, dtype=values.dtype, device=values.device)[:, None]
        return {'scale': scales.repeat(len(q), 1), 'q': q.repeat_interleave(steps, 0)}

    def extra_repr(self) -> str:
        return super().extra_repr() + (', strict' if self.strict else '') + (f', shift={self.shift}' if self.shift else '')
