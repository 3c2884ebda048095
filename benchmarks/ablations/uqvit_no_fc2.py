"""UQ-ViT W4A4 without NormQuant before fc2, as in the official detection code."""

_base_ = '../../configs/_base_/recipes/uqvit.py'

recipe = dict(
    name='uqvit_no_fc2',
    bits=dict(weight=4, activation=4),
    quantizers=dict(post_gelu=dict(rescale=None)),
)
