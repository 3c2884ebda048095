"""AdaLog W4A4 without one of its parts: one range for all channels after LayerNorm."""

_base_ = '../../configs/_base_/recipes/adalog.py'

recipe = dict(
    name='no_norm_reparameterization',
    bits=dict(weight=4, activation=4),
    quantizers=dict(post_norm=dict(rescale=None)),
)
