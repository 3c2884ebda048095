"""Transformer blocks on a CPU, worked through in pieces that stay in the cache.

A block ``x + attention(norm1(x))``, ``x + ffn(norm2(x))`` runs as: window by window (a
Vision Transformer has one) codes of the normalized tokens, queries, keys and values,
both products, codes of the attention's output; then, piece by piece of tokens, the
projection and the feed-forward network, added to them in place. Windows are padded,
shifted and cut by one index of tokens for each size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import IntegerBlock
from ..coders import DeMax
from ..merging import joined
from ..windows import shifted
from .attention import attend, attend_at_once

PIECE = 2**21
"""Values of the widest tensor of a piece: more leave the cache and take memory, fewer
are not worth the calls.
"""

LEAST = 2048
"""Tokens of a piece for the feed-forward network, at least: with fewer, reading the
weights costs most.
"""


class CpuBlock(IntegerBlock):
    """A block on a CPU: image by image, window by window, piece by piece of tokens."""

    def _images(self, x: Tensor, hw_shape: tuple[int, int] | None) -> Tensor:
        return joined([self._image(tokens, hw_shape)[None] for tokens in x])

    def _image(self, x: Tensor, hw_shape: tuple[int, int] | None) -> Tensor:
        """The tokens of one image, (tokens, channels)."""
        codes, x = self.qkv.encode_normalized_and_copy(self.norm1, x)
        attended = self._attention(codes, hw_shape)
        rows = max(LEAST, rows_of(self.fc1.out_features))
        for piece, attended_piece in zip(
            x.split(rows), attended.split(rows), strict=True
        ):
            self.proj.add_to(piece, attended_piece)
            self._feed_forward(piece)
        return x

    def _attention(self, codes: Tensor, hw_shape: tuple[int, int] | None) -> Tensor:
        """Codes for the projection from codes for queries, keys and values, (tokens,
        channels) both.
        """
        if self.window is None or hw_shape is None:
            return self._attend(codes[None], None)[0]
        windows, length = (
            shifted(*hw_shape, *self.window, codes.device),
            self.window[0] ** 2,
        )
        codes = torch.cat([codes, self.padding])
        count = rows_of(length * max(self.qkv.out_features, self.heads * length))
        attended = joined(
            [
                self._attend(
                    codes.index_select(0, token.flatten()).view(*token.shape, -1), mask
                )
                for group in windows.groups
                for token, mask in group.pieces(count)
            ]
        )
        return attended.flatten(0, 1).index_select(0, windows.place)

    def _attend(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Codes for the projection, (windows, length, channels), from codes for
        queries, keys and values.
        """
        count, length, channels = codes.shape
        steps = self.heads_steps(codes.view(-1, channels)).view(
            count, length, 3, self.heads, -1
        )
        attention = self.attention
        if mask is not None:
            attention = attention._replace(
                bias=mask if attention.bias is None else attention.bias + mask
            )
            torch._dynamo.maybe_mark_dynamic(attention.bias, 0)
        if self.window is None:
            torch._dynamo.maybe_mark_dynamic(
                steps, 1
            )  # a window's length is the same for all images
        elif isinstance(attention.probabilities, DeMax):
            return attend(steps, attention)
        return attend_at_once(steps, attention)


def rows_of(width: int) -> int:
    """Rows of a piece whose widest tensor has so many values in a row."""
    return max(1, PIECE // width)
