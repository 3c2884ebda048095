"""Products of codes with a weight's integers on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import QuantizationError
from ..errors import NoIntegerForm
from ..products import Steps
from .kernels import multiply_kernel
from .launch import launch, power_of_two, tried


class GpuProduct:
    """uint8 codes times int8 weights on tensor cores
    (:class:`mmptq.runtime.products.Product`).

    A weight's integers that int8 does not hold become ``w + excess``, with an excess
    for each output, and the sums gain its product with the sum of the codes. Codes of 8
    bits are multiplied as ``code - 128``.

    Args:
        integers: The weight's, (out, in), of at most 255 from the least to the largest
            of an output.
        zero_point: Of the codes.
        most: The largest code.

    Raises:
        NoIntegerForm: If the sums are not those of an int64 product, which is tried
            once.
    """

    at_once = takes_change = True

    def __init__(self, integers: Tensor, zero_point: int, most: int) -> None:
        integers = integers.to(torch.int64)
        excess = (integers.amax(1) - 127).clamp(min=0) + (integers.amin(1) + 128).clamp(
            max=0
        )
        self.weight = (integers - excess[:, None]).to(torch.int8).contiguous()
        self.above = 128 if most > 127 else 0
        self.lacking = ((self.above - zero_point) * integers.sum(1)).to(torch.int32)
        self.excess, self.has_excess = excess.to(torch.int32), bool(excess.any())
        self.none = torch.zeros(len(integers), device=integers.device)
        self._check(integers, zero_point, most)

    def _check(self, integers: Tensor, zero_point: int, most: int) -> None:
        codes = torch.randint(
            0,
            most + 1,
            (70, integers.shape[1]),
            generator=torch.Generator().manual_seed(0),
        ).to(integers.device)
        expected = (codes - zero_point).double() @ integers.double().T
        found = tried(
            lambda: self(codes.to(torch.uint8), torch.ones_like(self.none), None)
        )
        if not torch.equal(found, expected.float()):
            raise NoIntegerForm('Triton has no exact product for its shape')

    def __call__(
        self,
        codes: Tensor,
        gain: Tensor,
        offset: Tensor | None,
        steps: Steps | None = None,
        gelu: bool = False,
    ) -> Tensor:
        """See :class:`mmptq.runtime.products.Product`."""
        out = gain.new_empty(
            len(codes),
            len(self.weight),
            dtype=torch.float32 if steps is None else torch.uint8,
        )
        self._run(codes, gain, offset, out, steps, gelu=gelu)
        return out

    def add_to(
        self, x: Tensor, codes: Tensor, gain: Tensor, offset: Tensor | None
    ) -> None:
        """See :class:`mmptq.runtime.products.Product`."""
        self._run(codes, gain, offset, x, None, residual=x)

    def added(
        self, x: Tensor, codes: Tensor, gain: Tensor, offset: Tensor | None
    ) -> Tensor:
        """A tensor (rows, out), contiguous float32, with the product added to it."""
        out = torch.empty_like(x)
        self._run(codes, gain, offset, out, None, residual=x)
        return out

    def _run(
        self,
        codes: Tensor,
        gain: Tensor,
        offset: Tensor | None,
        out: Tensor,
        steps: Steps | None,
        gelu: bool = False,
        residual: Tensor | None = None,
    ) -> None:
        outputs, inputs = self.weight.shape
        if codes.shape[1] != inputs or out.shape != (
            len(codes),
            outputs,
        ):  # a kernel would read beyond them
            raise QuantizationError(
                f'a product of {inputs} inputs and {outputs} outputs got codes of shape'
                f' {tuple(codes.shape)} for a tensor of shape {tuple(out.shape)}'
            )
        rows, depth = 128, 128 if inputs % 128 == 0 else 64 if inputs % 64 == 0 else 32
        if inputs <= 128:
            depth = max(32, power_of_two(inputs))
        most_columns = (
            128 if inputs >= 384 else 64
        )  # with fewer inputs other programs have to hide what a tile waits for
        columns = min(most_columns, max(16, power_of_two(outputs)))
        scale, zero, most, change = steps or Steps(1.0, 0, 255)
        launch(
            multiply_kernel,
            (math.ceil(len(codes) / rows) * math.ceil(outputs / columns),),
            codes.contiguous(),
            self.weight,
            self.lacking,
            self.excess,
            gain,
            self.none if offset is None else offset,
            *(change or (self.none, self.none)),
            self.none if residual is None else residual,
            out,
            len(codes),
            1 / scale,
            float(zero),
            float(most),
            outputs,
            inputs,
            rows,
            columns,
            depth,
            self.above,
            self.has_excess,
            gelu,
            residual is not None,
            steps is not None,
            change is not None,
            num_warps=8 if columns == 128 else 4,
        )
