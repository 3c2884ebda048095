"""An attention between its layers on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Attention
from ..coders import AdaLog, DeMax, Uniform
from ..errors import NoIntegerForm, required
from ..matmul import EXACT
from ..windows import places
from .kernels import ADALOG, DEMAX, KEYS, UNIFORM, attend_kernel
from .launch import each_of, launch, power_of_two, vectors


class Probabilities(NamedTuple):
    """A coder of probabilities as the kernel takes it.

    Attributes:
        kind: Which branch of the kernel.
        numbers: Two for each head, () or (heads, 1, 1); what they are, the kernel says.
        last: The largest code.
        table: AdaLog's values.
        half: Whether DeMax's side data are float16.
    """

    kind: int
    numbers: tuple[Tensor | float, Tensor | float]
    last: float
    table: Tensor | None = None
    half: bool = False


def uniform_probabilities(coder: Uniform) -> Probabilities:
    """Those of a uniform coder."""
    return Probabilities(
        UNIFORM, (coder.scale, coder.most - coder.zero), float(coder.most)
    )


def adalog_probabilities(coder: AdaLog) -> Probabilities:
    """Those of an AdaLog coder."""
    table = coder.table.nan_to_num()
    return Probabilities(
        ADALOG, (coder.full.reciprocal(), coder.rate), float(coder.last), table
    )


def demax_probabilities(coder: DeMax) -> Probabilities:
    """Those of a DeMax coder.

    Raises:
        NoIntegerForm: For more than one maximum.
    """
    if coder.maxima > 1:
        raise NoIntegerForm('two or more maxima of DeMax')
    return Probabilities(DEMAX, (0.0, 0.0), float(coder.most), half=coder.half)


PROBABILITIES: dict[type, Callable[[Any], Probabilities]] = {
    Uniform: uniform_probabilities,
    AdaLog: adalog_probabilities,
    DeMax: demax_probabilities,
}
"""What the kernel takes for a coder of probabilities, by its class."""


class GpuAttention:
    """An attention between its layers.

    Args:
        attention: What it computes, with a uniform coder of its output.
        heads: Their number.
        channels: Of a head.
        window: Size and shift of the windows; None: one window.

    Raises:
        NoIntegerForm: For more than one maximum of DeMax, and heads of more channels
            than float32 has exact sums of.
    """

    def __init__(
        self,
        attention: Attention,
        heads: int,
        channels: int,
        window: tuple[int, int] | None,
    ) -> None:
        if channels * 255**2 >= EXACT:
            raise NoIntegerForm(f'heads of {channels} channels')
        self.heads, self.channels, self.window = heads, channels, window
        coder, device = attention.output, attention.gain.device
        assert isinstance(coder, Uniform)
        describe = required(
            PROBABILITIES,
            attention.probabilities,
            'mmptq.runtime.triton.attention.PROBABILITIES',
        )
        self.kind, numbers, self.last, table, self.half = describe(
            attention.probabilities
        )
        rows = [value for span in attention.spans for value in span] + [
            attention.scale,
            attention.gain,
            *numbers,
        ]
        self.rows = torch.stack(
            [
                each_of(
                    torch.as_tensor(value, dtype=torch.float32, device=device), heads
                )
                for value in rows
            ]
        )
        self.table = self.rows if table is None else table  # not read without one
        self.bias = (
            None
            if attention.bias is None
            else attention.bias.transpose(attention.keys, -1).contiguous()
        )
        self.change = vectors(
            attention.change, torch.ones(heads * channels, device=device)
        )
        self.coder = float(coder.inverse), float(coder.zero), float(coder.most)

    def __call__(
        self, steps: Tensor, images: int, hw_shape: tuple[int, int] | None
    ) -> Tensor:
        """From steps of queries, keys and values (images tokens + 1, 3 heads channels),
        the last row for padding, uint8, to codes for the next layer, (images tokens,
        heads channels), uint8.
        """
        tokens = (len(steps) - 1) // images
        out = steps.new_empty(len(steps) - 1, self.heads * self.channels)
        if self.window is None or hw_shape is None:
            token = region = self.rows  # not read
            windows, length, shifted = 1, tokens, False
        else:
            token, region = places(*hw_shape, *self.window, steps.device)
            (windows, length), shifted = token.shape, self.window[1] > 0
        width = max(16, power_of_two(self.channels))
        keys = min(
            KEYS, max(16, 8192 // width), max(16, power_of_two(length))
        )  # more would not fit into a GPU's shared memory
        queries = min(64, keys)
        staged = (
            self.kind != ADALOG and length > keys
        )  # Triton 3.6 cannot pipeline a product with looked-up values
        launch(
            attend_kernel,
            (images * windows, self.heads, math.ceil(length / queries)),
            steps,
            self.rows,
            self.rows if self.bias is None else self.bias,
            token,
            region,
            self.table,
            *self.change,
            out,
            images,
            tokens,
            length,
            windows,
            *self.coder,
            self.last,
            self.heads,
            self.channels,
            width,
            queries,
            keys,
            self.window is not None,
            self.bias is not None,
            shifted,
            self.kind,
            self.half,
            0 if self.window is None else length,
            num_warps=4,
            num_stages=2 if staged else 1,
        )
        return out
