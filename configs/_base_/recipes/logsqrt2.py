"""As adalog, with the base fixed to the square root of 2. Bits: --recipe logsqrt2_w8a8, logsqrt2_w4a4, ..."""
_base_ = './adalog.py'

recipe = dict(name='logsqrt2', quantizers=dict(post_gelu=dict(fixed_q=18.5), post_softmax=dict(fixed_q=18.5)))
