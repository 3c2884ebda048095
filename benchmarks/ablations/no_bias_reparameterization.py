"""AdaLog W4A4 without one of its parts: what GELU leaves below zero is cut off."""

_base_ = '../../configs/_base_/recipes/adalog.py'

recipe = dict(
    name='no_bias_reparameterization',
    bits=dict(weight=4, activation=4),
    quantizers=dict(post_gelu=dict(rescale=None)),
)
