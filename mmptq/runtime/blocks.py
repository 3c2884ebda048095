"""Transformer blocks in integers, worked through in pieces that stay in the cache.

A block ``x + attention(norm1(x))``, ``x + ffn(norm2(x))`` runs as: codes of the normalized tokens; window by window (a Vision Transformer
has one) queries, keys and values, both products, codes of the attention's output; piece by piece of tokens the projection and the
feed-forward network, added to the tokens. Windows are padded, shifted and cut by one index of codes for each size of image.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coders import DeMax, Uniform
from .kernels import Attention, attend, attend_at_once, map_of_normalized
from .ops import IntegerLinear, IntegerMatMul

PIECE = 2**22
"""Values of the widest tensor of a piece: more leave the cache and take memory, fewer are not worth the calls."""

KEPT = 8
"""Sizes of images whose windows a block keeps."""

LEAST = 2048
"""Tokens of a piece for the feed-forward network, at least: with fewer, reading the weights costs most."""


class Windows(NamedTuple):
    """How the tokens of an image are cut into windows.

    Attributes:
        token: The token at each place, (windows, length); behind the last one stands the padding.
        place: The place of each token, (tokens,).
        regions: Of each place: those of different regions of a window do not see each other, (windows, length).
    """

    token: Tensor
    place: Tensor
    regions: Tensor | None


def whole(tokens: int, device: torch.device) -> Windows:
    """All tokens in one window."""
    every = torch.arange(tokens, device=device)
    return Windows(every[None], every, None)


def shifted(height: int, width: int, size: int, shift: int, device: torch.device) -> Windows:
    """Swin's windows of a map (height, width): padded below and on the right, rolled by ``shift``, cut into ``size`` x ``size``."""
    rows, columns = -(-height // size) * size, -(-width // size) * size
    token = torch.full((rows, columns), height * width, device=device)
    token[:height, :width] = torch.arange(height * width, device=device).view(height, width)
    region = torch.zeros(rows, columns, device=device)
    if shift:
        token = token.roll((-shift, -shift), (0, 1))
        row, column = (torch.zeros(length, device=device) for length in (rows, columns))
        for line in (row, column):
            line[-size:-shift] = 1
            line[-shift:] = 2
        region = 3 * row[:, None] + column

    def cut(x: Tensor) -> Tensor:
        return x.view(rows // size, size, columns // size, size).transpose(1, 2).reshape(-1, size * size)

    index = cut(token)
    place = torch.empty(height * width + 1, dtype=torch.int64, device=device)
    place[index.flatten()] = torch.arange(index.numel(), device=device)
    return Windows(index, place[:-1], cut(region) if shift else None)


class IntegerBlock(nn.Module):
    """A block of a Swin or Vision Transformer; called as the block that it stands for.

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
        bias: Added to the scores, (heads, length, length).
        window: Size and shift of the windows; None: one window.

    Raises:
        NotImplementedError: If one of these is not what a fused block is written for.
    """

    padding: Tensor

    def __init__(self, norm1: nn.LayerNorm, qkv: IntegerLinear, qk: IntegerMatMul, pv: IntegerMatMul, proj: IntegerLinear,
                 norm2: nn.LayerNorm, fc1: IntegerLinear, act: nn.Module, fc2: IntegerLinear, heads: int, scale: float,
                 bias: Tensor | None = None, window: tuple[int, int] | None = None) -> None:
        super().__init__()
        for kind, modules in ((nn.LayerNorm, (norm1, norm2)), (IntegerLinear, (qkv, proj, fc1, fc2)), (IntegerMatMul, (qk, pv))):
            if any(type(module) is not kind for module in modules):
                raise NotImplementedError(f'not all are {kind.__name__}: {modules}')
        if not all(isinstance(coder, Uniform) for coder in (qkv.coder, qk.left)):
            raise NotImplementedError('queries, keys, values and what they are made from must be uniform')
        self.norm1, self.qkv, self.qk, self.pv, self.proj = norm1, qkv, qk, pv, proj
        self.norm2, self.fc1, self.act, self.fc2 = norm2, fc1, act, fc2
        self.heads, self.window = heads, window
        coders: Any = (qk.left, qk.right, pv.right)
        # About an even number halves round as about zero; codes of 8 bits have no room for one more.
        zeros = [coder.zero if coder.most == 255 else coder.zero + coder.zero % 2 for coder in coders]
        spans = tuple((zero, -coder.zero, coder.most - coder.zero) for zero, coder in zip(zeros, coders, strict=True))
        factors = [coder.inverse * factor for coder, factor in zip(coders, (scale, 1, 1), strict=True)]
        self.heads_steps = qkv.in_steps(self._each_output(factors), self._each_output(zeros))
        self.attention = Attention(spans, qk.gain, bias, pv.left, pv.gain, (qk.held, pv.held), proj.change, proj.coder)
        self.register_buffer('padding', qkv.encode(qkv.gain.new_zeros(2, qkv.in_features))[:1])
        self.windows: dict[tuple[int, int], Windows] = {}

    def _each_output(self, values: Sequence[Tensor]) -> Tensor:
        """Values of queries, keys and values, () or (heads, 1, 1), for each output of their layer."""
        channels = self.qkv.out_features // (3 * self.heads)
        return torch.stack([value.reshape(-1, 1).expand(self.heads, channels) for value in values]).flatten()

    def forward(self, x: Tensor, hw_shape: tuple[int, int] | None = None) -> Tensor:
        """Tokens (batch, tokens, channels), of maps of a shape for windows."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for tokens, target in zip(x, out, strict=True):
            windows = self._windows(hw_shape, len(tokens), x.device)
            self._attention(tokens, windows, target)
            self._feed_forward(target)
        return out

    def _windows(self, hw_shape: tuple[int, int] | None, tokens: int, device: torch.device) -> Windows:
        height, width = (1, tokens) if hw_shape is None else hw_shape
        if (height, width) not in self.windows:
            if len(self.windows) >= KEPT:
                self.windows.clear()
            self.windows[height, width] = (whole(tokens, device) if self.window is None
                                           else shifted(height, width, *self.window, device))
        return self.windows[height, width]

    def _attention(self, x: Tensor, windows: Windows, out: Tensor) -> None:
        """Writes ``x + attention(norm1(x))`` into ``out``, (tokens, channels) both."""
        channels, rows = x.shape[1], rows_of(x.shape[1])
        codes = torch.cat([*(self.qkv.encode_normalized(self.norm1, piece) for piece in x.split(rows)), self.padding])
        length = windows.token.shape[1]
        attended = torch.cat([self._attend(codes.index_select(0, index.flatten()).view(*index.shape, -1), regions) for index, regions in
                              _pieces(windows, rows_of(length * max(3 * channels, self.heads * length)))]).flatten(0, 1)
        for place, source, target in zip(windows.place.split(rows), x.split(rows), out.split(rows), strict=True):
            self.proj.add_to(target.copy_(source), attended.index_select(0, place))

    def _attend(self, codes: Tensor, regions: Tensor | None) -> Tensor:
        """Codes for the projection, (windows, length, channels), from codes for queries, keys and values."""
        count, length, channels = codes.shape
        steps = self.heads_steps(codes.view(-1, channels)).view(count, length, 3, self.heads, -1)
        if self.window is None:
            torch._dynamo.maybe_mark_dynamic(steps, 1)  # a window's length is the same for all images
        elif isinstance(self.attention.probabilities, DeMax):
            return attend(steps, regions, self.attention)
        return attend_at_once(steps, regions, self.attention)

    def _feed_forward(self, x: Tensor) -> None:
        """Adds ``ffn(norm2(x))`` to x, (tokens, channels)."""
        exact = isinstance(self.act, nn.GELU) and self.act.approximate == 'none'
        at_once = exact and self.fc1.gives_codes and self.fc2.change is None and isinstance(self.fc2.coder, Uniform)
        for piece in x.split(max(LEAST, rows_of(self.fc1.out_features))):
            codes = self.fc1.encode_normalized(self.norm2, piece)
            if at_once:
                codes = self.fc1.codes_of_gelu(codes, self.fc2.coder)  # type: ignore[arg-type]
            else:
                hidden = self.fc1.multiply(codes, exact)
                codes = self.fc2.encode(hidden if exact else self.act(hidden))
            self.fc2.add_to(piece, codes)


class IntegerMerging(nn.Module):
    """Swin's patch merging; called as mmdet's and mmsegmentation's ``PatchMerging``.

    Args:
        merging: The module.
        reduction: Its layer, which takes inputs in the order of :func:`merged_order`.
    """

    def __init__(self, merging: Any, reduction: IntegerLinear) -> None:
        super().__init__()
        order = merged_order(merging.in_channels)
        self.norm = nn.LayerNorm(merging.norm.normalized_shape, merging.norm.eps)
        self.norm.weight, self.norm.bias = (nn.Parameter(value.detach()[order]) for value in (merging.norm.weight, merging.norm.bias))
        self.reduction = reduction

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (batch, tokens / 4, 2 channels) and the size of their map."""
        height, width = input_size
        maps = x.view(len(x), height, width, -1)
        if height % 2 or width % 2:
            maps = F.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
        size = maps.shape[1] // 2, maps.shape[2] // 2
        # (batch height / 2, 2, width / 2, 2, channels): lines of patches
        lines = maps.reshape(len(x) * size[0], 2, size[1], 2, -1)
        out = x.new_empty(len(lines), size[1], self.reduction.out_features)
        count = max(1, rows_of(x.shape[-1] * 4) // size[1])
        for piece, target in zip(lines.split(count), out.split(count), strict=True):
            patches = piece.transpose(1, 2).flatten(0, 1).flatten(1)
            target.copy_(self.reduction.multiply(self.reduction.encode_normalized(self.norm, patches)).view(target.shape))
        return out.view(len(x), -1, out.shape[-1]), size


class MapNorm(nn.Module):
    """A layer norm whose output is made a map, channels outermost; it is so in memory, and only its shape is that of tokens.

    Args:
        norm: The layer norm.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, tokens, channels)."""
        maps = [map_of_normalized(tokens, self.norm.weight, self.norm.bias, self.norm.eps) for tokens in x]
        return (maps[0][None] if len(maps) == 1 else torch.stack(maps)).transpose(1, 2)


def merged_order(channels: int) -> Tensor:
    """For inputs of patch merging by row, column and channel of a patch, where they are by channel, row and column, (4 channels,)."""
    return torch.arange(4 * channels).view(channels, 2, 2).permute(1, 2, 0).flatten()


def is_merging(module: Any) -> bool:
    """Whether a module is a patch merging with a fused form."""
    if _qualified(module) not in MERGINGS:
        return False
    sampler = module.sampler
    return (all(value in (2, (2, 2)) for value in (sampler.kernel_size, sampler.stride)) and sampler.dilation in (1, (1, 1))
            and sampler.padding in (0, (0, 0)) and getattr(module.adap_padding, 'padding', None) == 'corner'
            and type(module.norm) is nn.LayerNorm)


def rows_of(width: int) -> int:
    """Rows of a piece whose widest tensor has so many values in a row."""
    return max(1, PIECE // width)


def _pieces(windows: Windows, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The windows' index and regions, about ``count`` windows at a time, as even as can be."""
    pieces = -(-len(windows.token) // count)
    regions: Any = [None] * pieces if windows.regions is None else windows.regions.tensor_split(pieces)
    return zip(windows.token.tensor_split(pieces), regions, strict=True)


def swin_block(block: Any) -> IntegerBlock:
    """Of mmdet's and mmsegmentation's ``SwinBlock``."""
    attention = block.attn.w_msa
    index = attention.relative_position_index
    bias = attention.relative_position_bias_table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()
    return IntegerBlock(block.norm1, attention.qkv, attention.qk, attention.pv, attention.proj, block.norm2, *_ffn(block.ffn),
                        attention.num_heads, attention.scale, bias.detach(), (block.attn.window_size, block.attn.shift_size))


def vit_block(block: Any) -> IntegerBlock:
    """Of mmsegmentation's ``TransformerEncoderLayer``, its attention written out (:class:`mmptq.layers.SelfAttention`)."""
    attention = block.attn.attn
    return IntegerBlock(block.norm1, attention.in_proj, attention.qk, attention.pv, attention.out_proj, block.norm2, *_ffn(block.ffn),
                        attention.num_heads, (attention.embed_dim // attention.num_heads) ** -0.5)


def _ffn(ffn: Any) -> tuple[Any, Any, Any]:
    """fc1, act and fc2 of mmcv's ``FFN``."""
    return ffn.layers[0][0], ffn.layers[0][1], ffn.layers[1]


BLOCKS = {'mmdet.SwinBlock': swin_block, 'mmseg.SwinBlock': swin_block, 'mmseg.TransformerEncoderLayer': vit_block}
"""Blocks with a fused form, by ``package.ClassName``."""

MERGINGS = ('mmdet.PatchMerging', 'mmseg.PatchMerging')


MAPPED = ('mmdet.SwinTransformer', 'mmseg.SwinTransformer')
"""Backbones whose own layer norms make maps."""


def fused_forms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """What blocks and layer norms of a model, its operations converted, are replaced by."""
    forms: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if _qualified(module) in MAPPED:
            forms |= {norm: MapNorm(norm) for norm in module.children() if type(norm) is nn.LayerNorm}
        block = fused_block(module)
        if block is not None:
            forms[module] = block
    return forms


def fused_block(block: nn.Module) -> IntegerBlock | None:
    """The fused form of a block, if there is one and its operations are integer ones."""
    made = BLOCKS.get(_qualified(block))
    try:
        return made and made(block)
    except NotImplementedError:  # some of its operations stay simulated
        return None


def _qualified(module: nn.Module) -> str:
    return f'{type(module).__module__.split(".")[0]}.{type(module).__name__}'
