"""Uniform affine quantization, per tensor, per channel or per head."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .base import Change, Grid, Params, Quantizer, around, beside, best_of, in_chunks

MOST_ZERO_POINTS = 16
"""Zero points that a grid tries for each scale, at most. With more of them the scales
of an 8-bit grid would be too few.
"""


def encode_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Codes ``clip(round(x / s) + z, 0, N - 1)``, int16. The division is a product with
    1/s, as in torch's kernels.
    """
    return (
        (torch.round(x * scale.reciprocal()) + zero_point)
        .clamp_(0, levels - 1)
        .to(torch.int16)
    )


def decode_uniform(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values ``s (codes - z)``."""
    return (codes - zero_point).to(scale.dtype) * scale


class UniformQuantizer(Quantizer):
    """``U(x; s, z) = s (clip(round(x/s) + z, 0, N-1) - z)`` with an integer zero point
    z; zero is always exact.

    Parameters: ``scale`` (float, positive) and ``zero_point`` (int32).

    Args:
        bits: Width of a code, 2 to 8.
        axis: Negative axis along which parameters differ, or None for one set.
        symmetric: Whether ranges are as wide below zero as above it: z is N/2, and
            8-bit integers ``code - z`` fit int8.
    """

    param_names = ('scale', 'zero_point')
    uniform: ClassVar[bool] = True
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self, bits: int, axis: int | None = None, symmetric: bool = False
    ) -> None:
        super().__init__(bits, axis)
        if not isinstance(symmetric, bool):
            raise ValueError(f'symmetric must be True or False, not {symmetric!r}')
        self.symmetric = symmetric

    def fault(self, name: str, value: Tensor) -> str | None:
        """As for all quantizers; a zero point is a code."""
        if name != 'zero_point':
            return super().fault(name, value)
        if value.dtype not in (torch.int32, torch.int64):
            return f'is of type {value.dtype}, not int32'
        if (
            value.numel()
            and not 0 <= int(value.min()) <= int(value.max()) < self.levels
        ):
            return f'is not within 0 to {self.levels - 1}'
        return super().fault(name, value.double())

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:  # type: ignore[override]
        return encode_uniform(x, scale, zero_point, self.levels)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:  # type: ignore[override]
        return decode_uniform(codes, scale, zero_point)

    def fake_quantize(  # type: ignore[override]
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        before: Change | None = None,
    ) -> Tensor:
        # A few passes over a piece in the cache; torch's fused kernels, and its clamp
        # to tensors, take many times as long.
        inverse, zero = scale.reciprocal(), zero_point.to(scale.dtype)

        def chain(piece: Tensor, out: Tensor) -> None:
            torch.mul(piece, inverse, out=out).round_().add_(zero).clamp_(
                0, self.levels - 1
            ).sub_(zero).mul_(scale)

        return in_chunks(chain, x, split=self.axis != -x.ndim, before=before)

    def rounder(self, x: Tensor) -> Callable[..., Tensor]:
        def rounded(scale: Tensor, zero_point: Tensor) -> Tensor:
            # To add a large number rounds; values on the edge between two codes may
            # round otherwise than in encode_uniform.
            large = 1.5 / torch.finfo(x.dtype).eps
            s, z = beside(scale), beside(zero_point).to(scale.dtype) + large
            return (
                (x[:, :, None] * s.reciprocal())
                .add_(z)
                .clamp_(large, large + self.levels - 1)
                .sub_(z)
                .mul_(s)
            )

        return rounded

    def range_params(self, low: Tensor, high: Tensor) -> Params:
        """Scale and zero point whose grid covers ``[min(low, 0), max(high, 0)]``.

        A range without width (a constant zero) gets scale 1, which keeps zero exact.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _usable(self._width(low, high) / self._steps)
        zero_point = (
            torch.full_like(scale, self.levels // 2)
            if self.symmetric
            else torch.round(-low / scale).clamp_(0, self.levels - 1)
        )
        return {'scale': scale, 'zero_point': zero_point.to(torch.int32)}

    def _width(self, low: Tensor, high: Tensor) -> Tensor:
        """How wide a grid from ``low`` to ``high`` is; a symmetric one goes as far on
        either side.
        """
        return (
            2 * torch.maximum(low.abs(), high.abs()) if self.symmetric else high - low
        )

    @property
    def _steps(self) -> int:
        """Of a grid, as many as codes less one; a symmetric one has none for the lowest
        code.
        """
        return self.levels - (2 if self.symmetric else 1)

    def candidates(
        self, values: Tensor, count: int, present: Params | None = None
    ) -> Grid:
        """FPCS's first grid: scales of ranges as wide as from the 0.9 and 0.1 quantiles
        to the extremes, times zero points.

        N zero points per tensor, N/2 per channel or head, at most
        :data:`MOST_ZERO_POINTS`. The paper centres them on N/2; here they are centred
        on the zero point of the whole range, which is the same where all N are tried,
        and for more bits does not waste the grid where values are one-sided. Symmetric
        ranges have one.
        """
        low, inner_low, inner_high, high = quantiles(
            values, (0, 0.1, 0.9, 1)
        )  # (groups,) each
        number = (
            1
            if self.symmetric
            else min(
                MOST_ZERO_POINTS, self.levels if self.axis is None else self.levels // 2
            )
        )
        steps = max(2, count // number)
        widest = self._width(low.clamp(max=0), high.clamp(min=0))
        narrowest = torch.minimum(self._width(inner_low, inner_high), widest)
        fractions = torch.linspace(
            0, 1, steps, dtype=values.dtype, device=values.device
        )[:, None]
        scales = (
            torch.lerp(narrowest, widest, fractions) / self._steps
        )  # (steps, groups)
        scales = torch.where(
            _usable(scales) == scales, scales, _usable(widest / self._steps)
        )
        center = self.range_params(low, high)['zero_point']
        first = (center - number // 2).clamp(0, self.levels - number)
        zero_points = (
            first
            + torch.arange(number, dtype=torch.int32, device=values.device)[:, None]
        )  # (number, groups)
        spacing = (widest - narrowest) / self._steps / (steps - 1)
        return Grid(
            {
                'scale': scales.repeat_interleave(number, 0),
                'zero_point': zero_points.repeat(steps, 1),
            },
            spacing,
        )

    def refine(
        self, grid: Grid, errors: Tensor, values: Tensor, count: int, width: int
    ) -> Grid:
        """Scales within half a spacing of each survivor; then the spacing is 7.5 times
        smaller.
        """
        best = best_of(grid, errors, width)
        children = max(2, count // width)
        params = {
            'scale': around(best['scale'], grid.spacing, children),
            'zero_point': best['zero_point'].repeat_interleave(children, 0),
        }
        return Grid(params, grid.spacing / (children - 0.5), grid.stage + 1)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(
        scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale)
    )


FEWEST, MOST = 2**7, 2**14
"""Values for an inner quantile: of a row at least, and of all rows at most unless each
has the least.
"""


def quantiles(values: Tensor, fractions: tuple[float, ...]) -> Tensor:
    """Quantiles of each row, (fractions, rows). Of long rows a random part is taken,
    but extremes (0 and 1) are exact.
    """
    size, count = values.shape[1], max(FEWEST, MOST // values.shape[0])
    part = values
    if size > 2 * count:
        part = values[
            :,
            torch.randint(
                size, (count,), generator=torch.Generator().manual_seed(0)
            ).to(values.device),
        ]
    inner = torch.quantile(
        part, torch.tensor(fractions, dtype=values.dtype, device=values.device), dim=1
    )
    exact = {0.0: values.amin(1), 1.0: values.amax(1)}
    return torch.stack(
        [
            exact.get(fraction, row)
            for fraction, row in zip(fractions, inner, strict=True)
        ]
    )
