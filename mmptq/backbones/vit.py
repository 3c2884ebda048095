"""Vision Transformer (Dosovitskiy et al., ICLR 2021; DeiT too) as mmsegmentation and
mmpretrain write it.
"""

from .spec import BackboneSpec, register_spec

VIT = register_spec(
    BackboneSpec(
        classes=('mmseg.VisionTransformer',),
        blocks=('patch_embed', 'layers.*'),
        attentions=('layers.*.attn.attn',),
        sites={
            'patch_embed.projection': 'image',
            'layers.*.attn.attn.in_proj': 'post_norm',
            'layers.*.attn.attn.out_proj': 'post_attention',
            'layers.*.ffn.layers.0.0': 'post_norm',
            'layers.*.ffn.layers.1': 'post_gelu',
        },
        title='ViT, DeiT of mmsegmentation',
        models=('UperNet', 'Segmenter', 'SETR', 'DPT', 'Mask R-CNN'),
    )
)

MMPRETRAIN_VIT = register_spec(
    BackboneSpec(
        classes=('mmpretrain.VisionTransformer',),
        blocks=('patch_embed', 'layers.*'),
        attentions=('layers.*.attn',),
        sites={
            'patch_embed.projection': 'image',
            'layers.*.attn.qkv': 'post_norm',
            'layers.*.attn.proj': 'post_attention',
            'layers.*.ffn.layers.0.0': 'post_norm',
            'layers.*.ffn.layers.1': 'post_gelu',
            'layers.*.ffn.w12': 'post_norm',
            'layers.*.ffn.w3': 'linear',
        },
        title='ViT, DeiT of mmpretrain',
        models=("any, with `out_type='featmap'`",),
    )
)
