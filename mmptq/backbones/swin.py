"""Swin Transformer (Liu et al., ICCV 2021) as mmdet, mmsegmentation and mmpretrain
write it.
"""

from .spec import BackboneSpec, register_spec

SWIN = register_spec(
    BackboneSpec(
        classes=(
            'mmdet.SwinTransformer',
            'mmseg.SwinTransformer',
            'mmpretrain.SwinTransformer',
        ),
        blocks=('patch_embed', 'stages.*.blocks.*', 'stages.*.downsample'),
        attentions=('stages.*.blocks.*.attn.w_msa',),
        sites={
            'patch_embed.projection': 'image',
            'stages.*.blocks.*.attn.w_msa.qkv': 'post_norm',
            'stages.*.blocks.*.attn.w_msa.proj': 'post_attention',
            'stages.*.blocks.*.ffn.layers.0.0': 'post_norm',
            'stages.*.blocks.*.ffn.layers.1': 'post_gelu',
            'stages.*.downsample.reduction': 'post_norm',
        },
        title='Swin Transformer',
        models=(
            'Mask R-CNN',
            'Cascade Mask R-CNN',
            'RetinaNet',
            'Mask2Former',
            'DINO',
            'UperNet',
        ),
    )
)
