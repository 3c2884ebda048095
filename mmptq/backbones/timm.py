"""Transformers as timm writes them, classifier included, and the wrappers that make
backbones of them.
"""

from .spec import BackboneSpec, register_spec, register_wrapper

register_wrapper('mmptq.TimmBackbone', 'model')
register_wrapper('mmseg.TIMMBackbone', 'timm_model.model')

TIMM_MODELS = ('any, in `mmptq.TimmBackbone`',)

TIMM_VIT = register_spec(
    BackboneSpec(
        classes=('timm.VisionTransformer', 'timm.Beit'),
        blocks=('patch_embed', 'blocks.*', 'head'),
        attentions=('blocks.*.attn',),
        sites={
            'patch_embed.proj': 'image',
            'blocks.*.attn.qkv': 'post_norm',
            'blocks.*.attn.proj': 'post_attention',
            'blocks.*.mlp.fc1': 'post_norm',
            'blocks.*.mlp.fc2': 'post_gelu',
            'head': 'linear',
        },
        title='ViT, DeiT, BEiT of timm',
        models=TIMM_MODELS,
    )
)
"""Vision Transformer (Dosovitskiy et al., ICLR 2021), DeiT (Touvron et al., ICML 2021),
BEiT (Bao et al., ICLR 2022).
"""

TIMM_EVA = register_spec(
    BackboneSpec(
        classes=('timm.Eva',),
        blocks=('patch_embed', 'blocks.*', 'head'),
        attentions=('blocks.*.attn',),
        sites={
            'patch_embed.proj': 'image',
            'blocks.*.attn.qkv': 'post_norm',
            'blocks.*.attn.[qkv]_proj': 'post_norm',
            'blocks.*.attn.proj': 'post_attention',
            'blocks.*.mlp.fc1': 'post_norm',
            'blocks.*.mlp.fc1_[gx]': 'post_norm',
            'blocks.*.mlp.fc2': 'linear',
            'head': 'linear',
        },
        title='EVA of timm',
        models=TIMM_MODELS,
    )
)
"""EVA-02 (Fang et al., 2023) and its relatives, with rotary positions; most have SwiGLU
in the place of GELU.
"""

TIMM_SWIN = register_spec(
    BackboneSpec(
        classes=('timm.SwinTransformer',),
        blocks=('patch_embed', 'layers.*.downsample', 'layers.*.blocks.*', 'head'),
        attentions=('layers.*.blocks.*.attn',),
        sites={
            'patch_embed.proj': 'image',
            'layers.*.downsample.reduction': 'post_norm',
            'layers.*.blocks.*.attn.qkv': 'post_norm',
            'layers.*.blocks.*.attn.proj': 'post_attention',
            'layers.*.blocks.*.mlp.fc1': 'post_norm',
            'layers.*.blocks.*.mlp.fc2': 'post_gelu',
            'head.fc': 'linear',
        },
        title='Swin Transformer of timm',
        models=TIMM_MODELS,
    )
)
"""Swin Transformer (Liu et al., ICCV 2021)."""

TIMM_SWIN_V2 = register_spec(
    BackboneSpec(
        classes=('timm.SwinTransformerV2',),
        blocks=TIMM_SWIN.blocks,
        attentions=TIMM_SWIN.attentions,
        sites={
            'patch_embed.proj': 'image',
            'layers.*.downsample.reduction': 'linear',
            'layers.*.blocks.*.attn.qkv': 'linear',
            'layers.*.blocks.*.attn.proj': 'post_attention',
            'layers.*.blocks.*.mlp.fc1': 'linear',
            'layers.*.blocks.*.mlp.fc2': 'post_gelu',
            'head.fc': 'linear',
        },
        title='Swin Transformer V2 of timm',
        models=TIMM_MODELS,
    )
)
"""Swin Transformer V2 (Liu et al., CVPR 2022): its LayerNorms follow the layers, its
queries and keys are of length one.
"""
