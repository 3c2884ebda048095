"""ViTDet (Li et al., ECCV 2022) as mmdetection's ``projects/ViTDet`` writes it.

The terms of relative position, products of the query with small tables, stay float.
"""

from .spec import BackboneSpec, register_spec

VITDET = register_spec(
    BackboneSpec(
        classes=('projects.ViT', 'vitdet.ViT'),
        blocks=('patch_embed', 'blocks.*'),
        attentions=('blocks.*.attn',),
        sites={
            'patch_embed.proj': 'image',
            'blocks.*.attn.qkv': 'post_norm',
            'blocks.*.attn.proj': 'post_attention',
            'blocks.*.mlp.fc1': 'post_norm',
            'blocks.*.mlp.fc2': 'post_gelu',
        },
        title='ViTDet',
        models=("Mask R-CNN of mmdetection's `projects/ViTDet`",),
    )
)
