"""AdaLog: quantization to an adaptive logarithmic base (Wu et al., AdaLog, ECCV 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Change, Grid, Params, Quantizer, around, beside, best_of, in_chunks
from .uniform import quantiles

R = 37
"""Denominator of the base's exponent, a prime: bases are ``2^(q/R)``."""

Q_RANGE = range(10, 138)
"""The numerators that are searched. q = 37 is log2; log-sqrt2 is q/R = 1/2, that is q =
18.5.
"""

LEAST_Q, MOST_Q = 1, 1000
"""The numerators that are possible at all."""


def encode_adalog(
    x: Tensor, scale: Tensor, q: Tensor, levels: int, strict: bool
) -> Tensor:
    """Codes ``k = round(-log2(clip(x/s, 0, 1)) r/q)``, cut at N, the code of exact zero
    (``strict``: at N - 1); N + 1 for NaN. int32.

    The paper clips at 1e-15, so that zero becomes ``2^-49.8 s`` where the codes reach
    that far (8 bits); here it stays zero.
    """
    k = (x / scale).clamp_(0, 1).log2_().mul_(-R / q).round_()
    return k.clamp_(max=levels - strict).nan_to_num_(nan=levels + 1).int()


def decode_table(q: Tensor, levels: int) -> tuple[Tensor, Tensor, int]:
    """The two look-up tables of integer inference.

    ``T1[k] = floor(k q / r)`` is a shift, ``T2[k] = round(G 2^(-((k q) mod r)/r))`` an
    integer in G/2..G; the value of code k is ``s 2^(-T1[k]) T2[k] / G``.

    Args:
        q: Numerator of the base's exponent, any shape.
        levels: N.

    Returns:
        T1 and T2 as float64 tensors of N integers for each q, (..., N), and G = 2N - 2.
    """
    steps = (
        torch.arange(levels, dtype=torch.float64, device=q.device)
        * q.to(torch.float64)[..., None]
    )
    shift = torch.floor(steps / R)
    largest = 2 * levels - 2
    return shift, torch.round(largest * torch.exp2(-(steps - shift * R) / R)), largest


def decode_values(scale: Tensor, q: Tensor, levels: int, strict: bool) -> Tensor:
    """The value of every code but NaN's, (..., N + 1) in the scale's dtype: N values
    and a zero (``strict``: N - 1 values and zeros).
    """
    shift, mantissa, largest = decode_table(q, levels)
    values = (
        scale.to(torch.float64)[..., None] * torch.exp2(-shift) * mantissa / largest
    )
    values = torch.cat([values, torch.zeros_like(values[..., :1])], -1)
    if strict:
        values[..., levels - 1] = 0
    return values.to(scale.dtype)


class AdaLogQuantizer(Quantizer):
    """Logarithmic quantization with base ``2^(q/37)`` of values in ``[0, scale]``.

    Codes at or beyond N are zero, so there are N + 1 levels; ``strict`` makes the last
    code zero and keeps to N levels, as b bits hold. Log2 is ``q=37``, log-sqrt2
    ``q=18.5``. NaN stays NaN.

    Args:
        bits: Width of a code, 2 to 8.
        strict: Exactly 2^bits levels, zero among them.
        fixed_scale: The scale, if it is known (1 for probabilities); not searched then.
        fixed_q: The base's numerator, 1 to 1000, if it is not to be adapted.

    Parameters: ``scale`` (float, shape ()) and ``q`` (float, shape ()).

    Raises:
        ValueError: If an option is of another type or out of range, naming it.
    """

    param_names = ('scale', 'q')
    signed: ClassVar[bool] = False
    scale: Tensor | None
    q: Tensor | None

    def __init__(
        self,
        bits: int,
        strict: bool = False,
        fixed_scale: float | None = None,
        fixed_q: float | None = None,
    ) -> None:
        super().__init__(bits)
        if not isinstance(strict, bool):
            raise ValueError(f'strict must be True or False, not {strict!r}')
        _require_within(
            'fixed_scale',
            fixed_scale,
            torch.finfo(torch.float32).tiny,
            torch.finfo(torch.float32).max,
        )
        _require_within('fixed_q', fixed_q, LEAST_Q, MOST_Q)
        self.strict = strict
        self.fixed_scale = fixed_scale
        self.fixed_q = fixed_q

    def fault(self, name: str, value: Tensor) -> str | None:
        """As for all quantizers; q is from 1 to 1000."""
        fault = super().fault(name, value)
        if fault is None and name == 'q' and not LEAST_Q <= float(value) <= MOST_Q:
            return f'is not within {LEAST_Q} to {MOST_Q}'
        return fault

    @property
    def zero_code(self) -> int:
        """The code of zero: the last one in strict mode, else the one beyond the last."""
        return self.levels - self.strict

    @property
    def effective_bits(self) -> float:
        """b in strict mode, else a little more: N values and zero."""
        return math.log2(self.zero_code + 1)

    def encode(self, x: Tensor, scale: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        return encode_adalog(x, scale, q, self.levels, self.strict).to(torch.int16)

    def decode(self, codes: Tensor, scale: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        return (
            self._table(scale, q)
            .index_select(0, codes.reshape(-1).int())
            .view(codes.shape)
        )

    def fake_quantize(  # type: ignore[override]
        self, x: Tensor, scale: Tensor, q: Tensor, before: Change | None = None
    ) -> Tensor:
        values = self._table(scale, q)

        def chain(piece: Tensor, out: Tensor) -> None:
            codes = encode_adalog(piece, scale, q, self.levels, self.strict)
            if (
                out.is_contiguous()
                and codes.is_contiguous()
                and out.dtype == values.dtype
            ):
                torch.index_select(values, 0, codes.view(-1), out=out.view(-1))
            else:
                out.copy_(values[codes])

        return in_chunks(chain, x, before=before)

    def _table(self, scale: Tensor, q: Tensor) -> Tensor:
        """The value of every code, NaN's the last, (N + 2,)."""
        return F.pad(
            decode_values(scale, q, self.levels, self.strict), (0, 1), value=math.nan
        )

    def rounder(self, x: Tensor) -> Callable[..., Tensor]:
        logarithm = x.clamp(min=0).log2_()[:, :, None]  # once for all candidates

        def rounded(scale: Tensor, q: Tensor) -> Tensor:
            # Values on the edge between two codes may round otherwise than in
            # encode_adalog.
            k = (
                (logarithm * beside(-R / q))
                .add_(beside(scale.log2() * R / q + 0.5))
                .clamp_(0.5, self.zero_code + 0.5)
            )
            tables = decode_values(
                scale, q, self.levels, self.strict
            )  # (n, groups, N + 1)
            starts = (
                torch.arange(scale.numel(), dtype=k.dtype, device=x.device).view(
                    scale.shape
                )
                * tables.shape[-1]
            )
            return (
                tables.view(-1)
                .index_select(0, k.add_(beside(starts)).int().view(-1))
                .view(k.shape)
            )  # a cut, after adding a half

        return rounded

    def range_params(self, low: Tensor, high: Tensor) -> Params:
        """The scale that covers ``high`` unless it is fixed, with base 2 unless that
        is; nothing below zero is covered.
        """
        scale = torch.where(
            high > torch.finfo(high.dtype).tiny, high, torch.ones_like(high)
        )
        if self.fixed_scale is not None:
            scale = torch.full_like(scale, self.fixed_scale)
        return {
            'scale': scale,
            'q': torch.full_like(scale, R if self.fixed_q is None else self.fixed_q),
        }

    def candidates(
        self, values: Tensor, count: int, present: Params | None = None
    ) -> Grid:
        """FPCS's first grid after GELU: all bases at the present scale, or, if there is
        none, at the one that covers all values.
        """
        params = (
            self.range_params(values.amin(1), values.amax(1))
            if present is None
            else present
        )
        scale = params['scale'][None]  # (1, groups)
        every = max(1, len(Q_RANGE) // count)  # log2 is always among them
        bases = (
            [self.fixed_q]
            if self.fixed_q is not None
            else Q_RANGE[(R - Q_RANGE.start) % every :: every]
        )
        q = torch.tensor(bases, dtype=values.dtype, device=values.device)[
            :, None
        ].expand(-1, scale.shape[1])
        return Grid({'scale': scale.expand_as(q), 'q': q}, torch.zeros_like(scale[0]))

    def refine(
        self, grid: Grid, errors: Tensor, values: Tensor, count: int, width: int
    ) -> Grid | None:
        """8 scales for each of the 16 best bases, from the 0.9 quantile of the larger
        values to the largest; then 4 around each of 32, and so on.

        (With ``width`` 16 and ``count`` 128. The paper: 16 scales for each of 8.) The
        larger values are those above the mean, which after GELU are the positive ones.
        """
        if self.fixed_scale is not None:
            return None
        best = best_of(grid, errors, width if grid.stage == 0 else 2 * width)
        children = max(2, count // len(best['q']))
        q = best['q'].repeat_interleave(children, 0)
        if grid.stage:
            return Grid(
                {'scale': around(best['scale'], grid.spacing, children), 'q': q},
                grid.spacing / (children - 0.5),
                grid.stage + 1,
            )
        ends = [
            quantiles(
                row[row >= row.mean().clamp(max=row.max())][None], (0.9, 1.0)
            ).flatten()
            for row in values
        ]  # a row: (values,)
        inner, high = torch.stack(ends, 1)  # (groups,) each
        fractions = torch.linspace(
            1, 0, children, dtype=values.dtype, device=values.device
        )[:, None]
        scales = self.range_params(high, torch.lerp(inner, high, fractions))[
            'scale'
        ]  # (children, groups)
        return Grid(
            {'scale': scales.repeat(len(best['q']), 1), 'q': q},
            (high - inner) / max(1, children - 1),
            1,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (', strict' if self.strict else '')


def _require_within(name: str, value: object, least: float, most: float) -> None:
    if value is not None and (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not least <= value <= most
    ):
        raise ValueError(
            f'{name} must be a number from {least:g} to {most:g}, not {value!r}'
        )
