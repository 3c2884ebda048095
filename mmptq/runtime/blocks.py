"""Transformer blocks in integers: parts and numbers, which all backends share."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from .attention import Attention
from .coders import Uniform
from .errors import NoIntegerForm
from .linear import IntegerLinear
from .matmul import IntegerMatMul


class IntegerBlock(nn.Module):
    """A block of a Swin or Vision Transformer; called as the block that it stands for.

    A backend's block says in :meth:`_images` how it runs.

    Args:
        norm1: Before attention.
        qkv: Queries, keys and values.
        qk: Product of queries and keys.
        pv: Product of probabilities and values.
        proj: After attention.
        norm2: Before the feed-forward network.
        fc1: Its first layer.
        act: Between its layers.
        fc2: Its second layer.
        heads: Their number.
        scale: Of the queries.
        bias: Added to the scores, (heads, length, length), by queries and keys.
        window: Size and shift of the windows; None: one window.

    Raises:
        NoIntegerForm: If one of these is not what a fused block is written for.
    """

    padding: Tensor

    def __init__(
        self,
        norm1: nn.LayerNorm,
        qkv: IntegerLinear,
        qk: IntegerMatMul,
        pv: IntegerMatMul,
        proj: IntegerLinear,
        norm2: nn.LayerNorm,
        fc1: IntegerLinear,
        act: nn.Module,
        fc2: IntegerLinear,
        heads: int,
        scale: float,
        bias: Tensor | None = None,
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        for kind, modules in (
            (IntegerLinear, (qkv, proj, fc1, fc2)),
            (IntegerMatMul, (qk, pv)),
        ):
            if any(type(module) is not kind for module in modules):
                raise NoIntegerForm(f'not all are {kind.__name__}: {modules}')
        if not all(isinstance(coder, Uniform) for coder in (qkv.coder, qk.left)):
            raise NoIntegerForm(
                'queries, keys, values and what they are made from must be uniform'
            )
        self.norm1, self.qkv, self.qk, self.pv, self.proj = norm1, qkv, qk, pv, proj
        self.norm2, self.fc1, self.act, self.fc2 = norm2, fc1, act, fc2
        self.heads, self.window = heads, window
        coders: Any = (qk.left, qk.right, pv.right)
        # About an even number halves round as about zero; codes of 8 bits have no room
        # for more.
        zeros = [
            coder.zero if coder.most == 255 else coder.zero + coder.zero % 2
            for coder in coders
        ]
        spans = tuple(
            (zero, -coder.zero, coder.most - coder.zero)
            for zero, coder in zip(zeros, coders, strict=True)
        )
        factors = [
            coder.inverse * factor
            for coder, factor in zip(coders, (scale, 1, 1), strict=True)
        ]
        self.heads_steps = qkv.in_steps(
            self._each_output(factors), self._each_output(zeros)
        )
        keys = -2 if window is not None and isinstance(pv.left, Uniform) else -1
        bias = None if bias is None else bias.transpose(keys, -1).contiguous()
        held = (
            at_once_or(qk.held, proj.in_features // heads),
            at_once_or(pv.held, None if window is None else window[0] ** 2),
        )
        self.attention = Attention(
            spans, qk.gain, bias, keys, pv.left, pv.gain, held, proj.change, proj.coder
        )
        self.exact = type(act) is nn.GELU and act.approximate == 'none'
        self.hidden_codes = (
            fc1.gelu_in_steps(fc2.coder, fc2.change) if self.exact else None
        )
        self.register_buffer(
            'padding', qkv.encode(qkv.gain.new_zeros(2, qkv.in_features))[:1]
        )

    def _each_output(self, values: Sequence[Tensor]) -> Tensor:
        """Values of queries, keys and values, () or (heads, 1, 1), for each output of
        their layer.
        """
        channels = self.qkv.out_features // (3 * self.heads)
        return torch.stack(
            [value.reshape(-1, 1).expand(self.heads, channels) for value in values]
        ).flatten()

    def forward(self, x: Tensor, hw_shape: tuple[int, int] | None = None) -> Tensor:
        """Tokens (batch, tokens, channels), of maps of a shape for windows."""
        if not len(x):
            raise QuantizationError('a block got a batch of 0 images')
        if not x.shape[1] or x.shape[2] != self.qkv.in_features:
            raise QuantizationError(
                f'a block of {self.qkv.in_features} channels got tokens of shape'
                f' {tuple(x.shape)}'
            )
        if self.window is not None and (
            hw_shape is None or math.prod(hw_shape) != x.shape[1]
        ):
            raise QuantizationError(
                f'a block got {x.shape[1]} tokens for a map of size {hw_shape}'
            )
        return self._images(x.contiguous(), hw_shape)

    def _images(self, x: Tensor, hw_shape: tuple[int, int] | None) -> Tensor:
        """What the block makes of tokens (batch, tokens, channels), contiguous."""
        raise NotImplementedError

    def _feed_forward(self, x: Tensor) -> None:
        """Adds ``ffn(norm2(x))`` to x, (tokens, channels)."""
        codes = self._codes_for_feed_forward(x)
        if self.hidden_codes is not None:
            codes = self.hidden_codes(codes)
        else:
            hidden = self.fc1.multiply(codes, self.exact)
            codes = self.fc2.encode(hidden if self.exact else self.act(hidden))
        self.fc2.add_to(x, codes)

    def _codes_for_feed_forward(self, x: Tensor) -> Tensor:
        return self.fc1.encode_normalized(self.norm2, x)


def at_once_or(held: int, length: int | None) -> int:
    """Columns whose sums float32 holds, the same for as many blocks as can be: each
    number is compiled for.

    Args:
        held: How many it holds.
        length: How many there are, None if that depends on the image.
    """
    return (
        sys.maxsize
        if length is not None and length <= held
        else 2 ** (held.bit_length() - 1)
    )
