"""oneDNN's product of uint8 codes and an int8 weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import QuantizationError
from ..products import Steps, beside


class Packed:
    """A weight as oneDNN keeps it, which torch can neither copy nor save; it is never
    changed.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: Any) -> Packed:
        return self

    def __reduce__(self) -> Any:
        raise QuantizationError(
            'a model in integers cannot be saved; save the calibrated one '
            '(quantized.pth, quantized.safetensors)'
        )


class OneDnnProduct:
    """oneDNN's uint8 times int8 (:class:`mmptq.runtime.products.Product`).

    Args:
        weight: int8, (out, in), or several of these side by side, whose sum it is.
        parts: How many.
        zero_point: Of the codes.
    """

    at_once = True
    takes_change = False

    def __init__(self, weight: Tensor, parts: int, zero_point: int) -> None:
        self.packed = Packed(torch.ops.onednn.qlinear_prepack(weight, None))
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int64)
        self.parts, self.zero_point = parts, zero_point

    def __call__(
        self,
        codes: Tensor,
        gain: Tensor,
        offset: Tensor | None,
        steps: Steps | None = None,
        gelu: bool = False,
    ) -> Tensor:
        """See :class:`mmptq.runtime.products.Product`."""
        assert steps is None or steps.change is None
        after: tuple[float, int, torch.dtype] = (1.0, 0, torch.float32)
        if steps is not None:
            after = (steps.scale, steps.zero, torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            beside(codes, self.parts),
            1.0,
            self.zero_point,
            self.packed.tensor,
            gain,
            self.weight_zero,
            offset,
            *after,
            'gelu' if gelu else 'none',
            [],
            'none',
        )
        if steps is None or steps.most == 255:
            return out
        return out.clamp_(max=steps.most)

    def add_to(
        self, x: Tensor, codes: Tensor, gain: Tensor, offset: Tensor | None
    ) -> None:
        """See :class:`mmptq.runtime.products.Product`."""
        torch.ops.onednn.qlinear_pointwise.binary(
            beside(codes, self.parts),
            1.0,
            self.zero_point,
            self.packed.tensor,
            gain,
            self.weight_zero,
            x,
            offset,
            1.0,
            0,
            torch.float32,
            1.0,
            0,
            'sum',
            1.0,
            'none',
            [],
            '',
        )
