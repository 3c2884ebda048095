"""UQ-ViT W4A4 with two maxima of each row apart."""

_base_ = '../../configs/_base_/recipes/uqvit.py'

recipe = dict(
    name='uqvit_two_maxima',
    bits=dict(weight=4, activation=4),
    quantizers=dict(post_softmax=dict(maxima=2)),
)
