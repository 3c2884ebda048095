"""AdaLog (ECCV 2024): adaptive-base logarithm after softmax and GELU, uniform elsewhere, least output error.

Bits: --recipe adalog_w8a8, adalog_w4a4, ... The shift is minus the minimum of GELU.
"""
_base_ = './minmax.py'

recipe = dict(
    name='adalog',
    method=dict(_delete_=True, type='AdaLog'),
    quantizers=dict(
        post_gelu=dict(_delete_=True, type='AdaLogQuantizer', shift=0.16997124254703522),
        post_softmax=dict(_delete_=True, type='AdaLogQuantizer', fixed_scale=1.0),
    ))
