"""As adalog, with the base fixed to 2. Bits: --recipe log2_w8a8, log2_w4a4, ..."""
_base_ = './adalog.py'

recipe = dict(name='log2', quantizers=dict(post_gelu=dict(fixed_q=37), post_softmax=dict(fixed_q=37)))
