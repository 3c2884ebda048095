"""Naive min-max: one range for each tensor, weights and attention's operands too. Bits: --recipe minmax_w8a8_tensor, ..."""
_base_ = './minmax.py'

recipe = dict(
    name='minmax_tensor',
    quantizers=dict(
        weight=dict(per_channel=False),
        query=dict(per_head=False),
        key=dict(per_head=False),
        value=dict(per_head=False),
    ))
