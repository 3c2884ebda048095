"""UQ-ViT W4A4 without DeMax: probabilities uniform, one range for all."""

_base_ = '../../configs/_base_/recipes/uqvit.py'

recipe = dict(
    name='uqvit_no_demax',
    bits=dict(weight=4, activation=4),
    quantizers=dict(post_softmax=dict(_delete_=True, type='UniformQuantizer')),
)
