"""DeMax: rows quantized without their largest entries, which are kept apart (UQ-ViT,
AAAI 2026).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import Change, Params, Quantizer, in_chunks

SIDES = {'float32': torch.float32, 'float16': torch.float16}
"""What the side data of a row may be kept in."""


class Side(NamedTuple):
    """What belongs to the codes of each row.

    Attributes:
        maximum: The entries taken out, (..., rows, maxima).
        position: Where they stood, (..., rows, maxima).
        step: The value of a code's unit, (..., rows, 1); 0 where nothing else is in the
            row.
    """

    maximum: Tensor
    position: Tensor
    step: Tensor


Codes = tuple[Tensor, Side]


class DeMaxQuantizer(Quantizer):
    """Uniform quantization of each row (the last dimension) of attention probabilities,
    its largest entry apart.

    ``j* = argmax a``, ``m = a_j*``; without it, ``D = max a / (N - 1)`` and codes
    ``clip(round(a / D), 0, N - 1)``. Nothing is stored: each row has its own m, j* and
    D, the side data. A row with no other entry is exact. Of equal maxima the first is
    taken out.

    Args:
        bits: Width of a code, 2 to 8.
        maxima: Entries of a row that are taken out, one after another.
        side: Type of m and D, ``float32`` or ``float16``.

    Parameters: ``length`` (float, shape ()), entries of a row in calibration on the
    average; its being there says that the model is quantized, and the effective bits
    follow from it.

    Raises:
        ValueError: If ``maxima`` is not a whole number of at least 1, or ``side`` is
            unknown.
    """

    param_names = ('length',)
    dynamic: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    uniform: ClassVar[bool] = True
    length: Tensor | None

    def __init__(self, bits: int, maxima: int = 1, side: str = 'float32') -> None:
        super().__init__(bits)
        if isinstance(maxima, bool) or not isinstance(maxima, int) or maxima < 1:
            raise ValueError(
                f'maxima must be a whole number and at least 1, not {maxima!r}'
            )
        if not isinstance(side, str) or side not in SIDES:
            raise ValueError(f'side is one of {", ".join(SIDES)}, not {side!r}')
        self.maxima, self.side = maxima, side

    def fault(self, name: str, value: Tensor) -> str | None:
        """As for all quantizers; a row has an entry at least."""
        fault = super().fault(name, value)
        if fault is None and not (value >= 1).all():
            return 'is not a length, of at least 1'
        return fault

    @property
    def effective_bits(self) -> float:
        """Bits of an entry with its share of the row's side data, for rows as long as
        in calibration.
        """
        if self.length is None:
            return float(self.bits)
        return self.bits + self.side_bits(float(self.length)) / float(self.length)

    def side_bits(self, length: float) -> float:
        """Bits of the side data of a row of so many entries: m, D, and j* as an index."""
        value, taken = torch.finfo(SIDES[self.side]).bits, min(self.maxima, length)
        return value * (taken + 1) + taken * math.ceil(math.log2(max(2.0, length)))

    def observed(self, samples: Sequence[Tensor]) -> Params:
        """The parameters from samples of what will be quantized, (..., rows, length)
        each.
        """
        rows = [x.shape[:-1].numel() for x in samples]
        length = sum(
            count * x.shape[-1] for count, x in zip(rows, samples, strict=True)
        ) / max(1, sum(rows))
        return {'length': samples[0].new_tensor(length)}

    def encode(self, x: Tensor, length: Tensor) -> Codes:  # type: ignore[override]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        side = self._codes(x, out)
        return out.to(torch.int16), side

    def decode(self, codes: Codes, length: Tensor) -> Tensor:  # type: ignore[override]
        kept, side = codes
        return (kept.to(side.step.dtype) * side.step).scatter(
            -1, side.position, side.maximum
        )

    def fake_quantize(  # type: ignore[override]
        self, x: Tensor, length: Tensor, before: Change | None = None
    ) -> Tensor:
        def chain(piece: Tensor, out: Tensor) -> None:
            side = self._codes(piece, out)
            out.mul_(side.step).scatter_(-1, side.position, side.maximum)

        return in_chunks(chain, x, split=x.ndim > 1, before=before)

    def _codes(self, x: Tensor, out: Tensor) -> Side:
        """Writes the codes into ``out``."""
        out.copy_(x)
        taken, gone = (
            [],
            (-1 if self.maxima > 1 else 0),
        )  # below all others, so that no place is taken twice
        for _ in range(min(self.maxima, x.shape[-1])):
            maximum, position = out.max(-1, keepdim=True)
            out.scatter_(-1, position, gone)
            taken.append((maximum, position))
        if gone:
            out.clamp_(min=0)
        step = out.amax(-1, keepdim=True).clamp_(min=0) / (self.levels - 1)
        maxima, positions = (torch.cat(parts, -1) for parts in zip(*taken, strict=True))
        if self.side != 'float32':
            maxima, step = (
                value.to(SIDES[self.side]).to(x.dtype) for value in (maxima, step)
            )
        usable = step > torch.finfo(step.dtype).tiny  # 1 over anything less overflows
        step = torch.where(usable, step, torch.zeros_like(step))
        out.mul_(
            torch.where(usable, step, torch.ones_like(step)).reciprocal()
        ).round_().clamp_(0, self.levels - 1)
        return Side(maxima, positions, step)

    def rounder(self, x: Tensor) -> Callable[..., Tensor]:
        raise NotImplementedError('DeMax has nothing to search')


def product(codes: Codes, values: Tensor) -> Tensor:
    """Probabilities times values as integers do it: one product of codes, and the row
    that each maximum gathers.

    ``P V = D (codes V) + m V[j*]``.

    Args:
        codes: From :meth:`DeMaxQuantizer.encode`, (..., rows, length).
        values: (..., length, columns).

    Returns:
        (..., rows, columns).
    """
    kept, side = codes
    result = (kept.to(values.dtype) @ values) * side.step
    for number in range(side.position.shape[-1]):
        index = side.position[..., number, None].expand(
            *side.position.shape[:-1], values.shape[-1]
        )
        result = result + side.maximum[..., number, None] * values.expand(
            *result.shape[:-2], *values.shape[-2:]
        ).gather(-2, index)
    return result
