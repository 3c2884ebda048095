"""Vision Transformer (Dosovitskiy et al., ICLR 2021; DeiT too) as timm writes it, its classifier included."""
from .spec import BackboneSpec, register_spec

TIMM_VIT = register_spec(BackboneSpec(
    classes=('timm.VisionTransformer',),
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
    title='ViT, DeiT of timm',
    models=('classifiers, for Python users',),
))
