"""What has a fused form in the integer runtime, as data: full names of classes, and
where their parts are.

A subclass has none, since it may compute something else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockParts:
    """Where a block ``x + attention(norm1(x))``, ``x + ffn(norm2(x))`` has its parts:
    attributes below the block.

    Attributes:
        attention: What has ``num_heads`` and computes the products; with relative
            positions their table and index, named as in Swin.
        attention_class: Its class before it was quantized.
        qkv: Queries, keys and values, in this order, heads within.
        proj: After attention.
        fc1: The first layer of the feed-forward network.
        act: Between its layers.
        fc2: Its second layer.
        norm1: Before attention.
        norm2: Before the feed-forward network.
        windows: What has a ``window_size`` and a ``shift_size``; None: all tokens of an
            image see each other.
        scales: After attention and after the feed-forward network: an identity, or a
            ``gamma`` for each channel.
        identities: What must be an identity or absent.
        containers: Modules between the block and its parts, and the class that each
            must be of.
    """

    attention: str
    attention_class: str
    qkv: str
    proj: str
    fc1: str
    act: str
    fc2: str
    norm1: str = 'norm1'
    norm2: str = 'norm2'
    windows: str | None = None
    scales: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    containers: tuple[tuple[str, str], ...] = ()


_FFN = ('ffn', 'mmcv.cnn.bricks.transformer.FFN')


def _swin(package: str) -> BlockParts:
    return BlockParts(
        'attn.w_msa',
        f'{package}.models.backbones.swin.WindowMSA',
        'attn.w_msa.qkv',
        'attn.w_msa.proj',
        'ffn.layers.0.0',
        'ffn.layers.0.1',
        'ffn.layers.1',
        windows='attn',
        identities=('ffn.gamma2',),
        containers=(_FFN, ('attn', f'{package}.models.backbones.swin.ShiftWindowMSA')),
    )


BLOCKS = {
    'mmdet.models.backbones.swin.SwinBlock': _swin('mmdet'),
    'mmseg.models.backbones.swin.SwinBlock': _swin('mmseg'),
    'mmseg.models.backbones.vit.TransformerEncoderLayer': BlockParts(
        'attn.attn',
        'mmptq.layers.attention.SelfAttention',
        'attn.attn.in_proj',
        'attn.attn.out_proj',
        'ffn.layers.0.0',
        'ffn.layers.0.1',
        'ffn.layers.1',
        identities=('ffn.gamma2',),
        containers=(_FFN, ('attn', 'mmcv.cnn.bricks.transformer.MultiheadAttention')),
    ),
    'timm.models.vision_transformer.Block': BlockParts(
        'attn',
        'timm.layers.attention.Attention',
        'attn.qkv',
        'attn.proj',
        'mlp.fc1',
        'mlp.act',
        'mlp.fc2',
        scales=('ls1', 'ls2'),
        identities=('attn.q_norm', 'attn.k_norm', 'attn.norm', 'attn.gate', 'mlp.norm'),
        containers=(('mlp', 'timm.layers.mlp.Mlp'),),
    ),
}
"""Blocks by their class."""

NORMS = ('torch.nn.modules.normalization.LayerNorm', 'timm.layers.norm.LayerNorm')
"""Layer norms that compute just ``F.layer_norm``."""

MERGINGS = (
    'mmdet.models.layers.transformer.utils.PatchMerging',
    'mmseg.models.utils.embed.PatchMerging',
)
"""Swin's patch mergings, called with tokens and the size of their map."""

MAPPED = (
    'mmdet.models.backbones.swin.SwinTransformer',
    'mmseg.models.backbones.swin.SwinTransformer',
)
"""Backbones whose own layer norms are before what they return, as maps."""


def full_name(cls: type) -> str:
    """``package.module.ClassName``."""
    return f'{cls.__module__}.{cls.__qualname__}'
