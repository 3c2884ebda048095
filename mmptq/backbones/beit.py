"""BEiT (Bao et al., ICLR 2022) and MAE (He et al., CVPR 2022) as mmsegmentation writes
them.
"""

from .spec import BackboneSpec, register_spec

BEIT = register_spec(
    BackboneSpec(
        classes=('mmseg.BEiT', 'mmseg.MAE'),
        blocks=('patch_embed', 'layers.*'),
        attentions=('layers.*.attn',),
        sites={
            'patch_embed.projection': 'image',
            'layers.*.attn.qkv': 'post_norm',
            'layers.*.attn.proj': 'post_attention',
            'layers.*.ffn.layers.0.0': 'post_norm',
            'layers.*.ffn.layers.1': 'post_gelu',
        },
        title='BEiT, MAE',
        models=('UperNet',),
    )
)
