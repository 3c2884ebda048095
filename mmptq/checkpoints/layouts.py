"""Other code's names of a backbone's weights, and those of mmdet 3 and mmsegmentation
1.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import QuantizationError
from .reading import some


class Key(NamedTuple):
    """One weight of a layout."""

    old: str
    new: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    """Which entry of the last dimension comes to each place; None leaves all where they
    are.
    """


@dataclass(frozen=True)
class Layout:
    """The names that a code base gives to the weights of a backbone."""

    name: str
    owner: str
    """Whose names they are, for messages."""
    target: str
    """The backbone that gets the weights."""
    mark: str
    """Keys that only this layout has: a regular expression."""
    new_mark: str
    """Keys that only the target has."""
    dropped: str
    """Keys that the target needs not: the classifier, and masks that it makes itself.
    """
    prefix: str
    """What the keys of a backbone without a head begin with after the conversion, so
    that ``init_cfg`` finds them.
    """
    keys: Callable[[Shapes], Iterator[Key]]


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_keys` did."""

    layout: Layout
    state_dict: OrderedDict[str, Tensor]
    renamed: int
    permuted: int
    unchanged: int
    dropped: tuple[str, ...]


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of a backbone's weights by old name."""

    def of(self, key: str, dims: int) -> tuple[int, ...]:
        """The shape of a weight that others are measured by.

        Raises:
            QuantizationError: If it is missing, or has not so many dimensions.
        """
        if key not in self:
            raise QuantizationError(f'the checkpoint lacks {key}')
        if len(self[key]) != dims:
            raise QuantizationError(
                f'{key} has shape {self[key]}, not {dims} dimensions'
            )
        return self[key]

    def count(self, pattern: str) -> int:
        """How many modules a list has, by the largest number that a regular expression
        finds.
        """
        return max(
            (
                int(match[1]) + 1
                for match in map(re.compile(pattern).match, self)
                if match
            ),
            default=0,
        )


def _layer(
    old: str,
    new: str,
    shape: tuple[int, ...],
    bias: bool = True,
    order: Tensor | None = None,
) -> Iterator[Key]:
    yield Key(f'{old}.weight', f'{new}.weight', shape, order)
    if bias:
        yield Key(f'{old}.bias', f'{new}.bias', shape[:1], order)


def merging_order(dims: int) -> Tensor:
    """The order of the 4C values that a patch merging reads, as ``nn.Unfold`` has them
    (channel, row, column), among those of the authors, who concatenate (column, row,
    channel).
    """
    return torch.arange(4 * dims).view(2, 2, dims).permute(2, 1, 0).flatten()


def _swin(shapes: Shapes) -> Iterator[Key]:
    embedding = shapes.of('patch_embed.proj.weight', 4)
    dims, stages = embedding[0], shapes.count(r'layers\.(\d+)\.')
    qkv_bias = 'layers.0.blocks.0.attn.qkv.bias' in shapes
    yield from _layer('patch_embed.proj', 'patch_embed.projection', embedding)
    yield from _layer('patch_embed.norm', 'patch_embed.norm', (dims,))
    for i in range(stages):
        for j in range(
            max(1, shapes.count(rf'layers\.{i}\.blocks\.(\d+)\.'))
        ):  # no stage is without blocks
            old, new = f'layers.{i}.blocks.{j}', f'stages.{i}.blocks.{j}'
            table = shapes.of(
                f'{old}.attn.relative_position_bias_table', 2
            )  # ((2 window - 1)^2, heads)
            window = (math.isqrt(table[0]) + 1) // 2
            hidden = shapes.of(f'{old}.mlp.fc1.weight', 2)[0]
            yield Key(
                f'{old}.attn.relative_position_bias_table',
                f'{new}.attn.w_msa.relative_position_bias_table',
                table,
            )
            yield Key(
                f'{old}.attn.relative_position_index',
                f'{new}.attn.w_msa.relative_position_index',
                (window**2, window**2),
            )
            yield from _layer(f'{old}.norm1', f'{new}.norm1', (dims,))
            yield from _layer(
                f'{old}.attn.qkv', f'{new}.attn.w_msa.qkv', (3 * dims, dims), qkv_bias
            )
            yield from _layer(
                f'{old}.attn.proj', f'{new}.attn.w_msa.proj', (dims, dims)
            )
            yield from _layer(f'{old}.norm2', f'{new}.norm2', (dims,))
            yield from _layer(f'{old}.mlp.fc1', f'{new}.ffn.layers.0.0', (hidden, dims))
            yield from _layer(f'{old}.mlp.fc2', f'{new}.ffn.layers.1', (dims, hidden))
        if (
            f'norm{i}.weight' in shapes
        ):  # only stages with an output have one, and no stage of a classifier
            yield from _layer(f'norm{i}', f'norm{i}', (dims,))
        if i < stages - 1:
            old, new, order = (
                f'layers.{i}.downsample',
                f'stages.{i}.downsample',
                merging_order(dims),
            )
            yield from _layer(f'{old}.norm', f'{new}.norm', (4 * dims,), order=order)
            yield from _layer(
                f'{old}.reduction',
                f'{new}.reduction',
                (2 * dims, 4 * dims),
                bias=False,
                order=order,
            )
        dims *= 2


def _vit(shapes: Shapes) -> Iterator[Key]:
    embedding = shapes.of('patch_embed.proj.weight', 4)
    dims = embedding[0]
    yield Key('cls_token', 'cls_token', (1, 1, dims))
    yield Key('pos_embed', 'pos_embed', (1, shapes.of('pos_embed', 3)[1], dims))
    yield from _layer('patch_embed.proj', 'patch_embed.projection', embedding)
    for i in range(shapes.count(r'blocks\.(\d+)\.')):
        old, new = f'blocks.{i}', f'layers.{i}'
        hidden = shapes.of(f'{old}.mlp.fc1.weight', 2)[0]
        yield from _layer(f'{old}.norm1', f'{new}.ln1', (dims,))
        yield Key(
            f'{old}.attn.qkv.weight',
            f'{new}.attn.attn.in_proj_weight',
            (3 * dims, dims),
        )
        yield Key(f'{old}.attn.qkv.bias', f'{new}.attn.attn.in_proj_bias', (3 * dims,))
        yield from _layer(f'{old}.attn.proj', f'{new}.attn.attn.out_proj', (dims, dims))
        yield from _layer(f'{old}.norm2', f'{new}.ln2', (dims,))
        yield from _layer(f'{old}.mlp.fc1', f'{new}.ffn.layers.0.0', (hidden, dims))
        yield from _layer(f'{old}.mlp.fc2', f'{new}.ffn.layers.1', (dims, hidden))
    if (
        'norm.weight' in shapes
    ):  # a classifier of mean features norms these instead (fc_norm)
        yield from _layer('norm', 'ln1', (dims,))


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name='swin',
            owner="the authors' Swin",
            target='SwinTransformer',
            keys=_swin,
            mark=r'layers\.\d+\.blocks\.',
            new_mark=r'stages\.\d+\.blocks\.',
            dropped=r'(head|norm)\..*|layers\.\d+\.blocks\.\d+\.attn_mask',
            prefix='backbone.',
        ),
        Layout(
            name='vit',
            owner="timm's ViT",
            target='VisionTransformer',
            keys=_vit,
            mark=r'blocks\.\d+\.',
            new_mark=r'layers\.\d+\.(ln1|ln2|attn\.attn|ffn)\.',
            dropped=r'(head|fc_norm|pre_logits)\..*',
            prefix='',
        ),
    )
}
"""By name."""


def find_layout(keys: list[str], name: str | None = None) -> tuple[Layout, str]:
    """The layout of a checkpoint, and what the keys of its backbone begin with
    (nothing, or ``backbone.``).

    Args:
        keys: Of the checkpoint.
        name: Of the layout that it should have; by default any.

    Raises:
        QuantizationError: If it has none, another, several, or that of mmdet 3 and
            mmsegmentation 1 already.
    """
    found: dict[
        tuple[Layout, str, bool], str
    ] = {}  # the first key of a layout, prefix, still the old one
    for layout in LAYOUTS.values():
        for key in keys:
            if match := re.match(
                rf'(backbone\.)?(?:({layout.mark})|{layout.new_mark})', key
            ):
                found.setdefault((layout, match[1] or '', match[2] is not None), key)
    if not found:
        raise QuantizationError(
            'no backbone of a known layout'
            f' ({", ".join(layout.owner for layout in LAYOUTS.values())}); its keys are'
            f' {some(keys)}'
        )
    if len(found) > 1:
        raise QuantizationError(f'keys of several layouts: {", ".join(found.values())}')
    (layout, prefix, old), key = found.popitem()
    if not old:
        raise QuantizationError(f'converted already: it has {key}')
    if name not in (None, layout.name):
        raise QuantizationError(
            f'not of kind {name}: it has {key}, as {layout.owner} ({layout.name})'
        )
    return layout, prefix


def convert_keys(weights: Mapping[str, Tensor], name: str | None = None) -> Conversion:
    """Gives the weights of a backbone, alone or in a whole model, the names and the
    order that mmdet 3 and mmsegmentation 1 expect.

    Keys outside the backbone pass on as they are.

    Args:
        weights: By old key.
        name: Of their layout; by default it is found.

    Returns:
        The weights by new key, and counts.

    Raises:
        QuantizationError: If the layout is not what it should be, or keys of the
            backbone are missing, unknown or of wrong shape.
    """
    state = {key.removeprefix('module.'): value for key, value in weights.items()}
    layout, prefix = find_layout(list(state), name)
    shapes = Shapes(
        {
            key.removeprefix(prefix): tuple(value.shape)
            for key, value in state.items()
            if key.startswith(prefix)
        }
    )
    known = {
        prefix + key.old: key._replace(new=(prefix or layout.prefix) + key.new)
        for key in layout.keys(shapes)
    }
    others = [prefix + key for key in shapes if prefix + key not in known]
    dropped = [
        key for key in others if re.fullmatch(layout.dropped, key.removeprefix(prefix))
    ]
    faults = {
        'lacks': [old for old in known if old not in state],
        'has shapes that do not fit:': [
            f'{old} {tuple(state[old].shape)}, not {key.shape}'
            for old, key in known.items()
            if old in state and state[old].shape != key.shape
        ],
        f'has what {layout.target} has no place for:': [
            key for key in others if key not in dropped
        ],
    }
    if any(faults.values()):
        found = '; it '.join(
            f'{fault} {some(keys)}' for fault, keys in faults.items() if keys
        )
        raise QuantizationError(
            f'these are not the keys of {layout.owner} ({layout.name}): the checkpoint'
            f' {found}'
        )

    state_dict: OrderedDict[str, Tensor] = OrderedDict()
    renamed = permuted = 0
    for old, value in state.items():
        if old not in dropped:
            _, new, _, order = known.get(old, Key(old, old, ()))
            state_dict[new] = value if order is None else value[..., order]
            renamed += new != old
            permuted += order is not None
    # torch keeps versions of modules beside a state dict, which heads of mmdet ask for.
    versions = getattr(weights, '_metadata', {})
    state_dict._metadata = OrderedDict(  # type: ignore[attr-defined]
        (key.removeprefix('module.'), versions[key]) for key in versions
    )
    return Conversion(
        layout, state_dict, renamed, permuted, len(state_dict) - renamed, tuple(dropped)
    )
