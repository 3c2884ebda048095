"""UQ-ViT W4A4 without NormQuant: no rescale anywhere."""

_base_ = '../../configs/_base_/recipes/uqvit.py'

recipe = dict(
    name='uqvit_no_normquant',
    bits=dict(weight=4, activation=4),
    quantizers=dict(
        post_norm=dict(rescale=None),
        post_attention=dict(rescale=None),
        post_gelu=dict(rescale=None),
    ),
)
