"""AdaLog (ECCV 2024) in full. Bits: --recipe adalog_w8a8, adalog_w4a4, ...

Adaptive-base logarithm after softmax and GELU, with bias reparameterisation; one quantizer per channel after LayerNorm, made one
per layer by reparameterisation; FPCS; inputs from the float model.
"""
_base_ = './minmax.py'

recipe = dict(
    name='adalog',
    method=dict(_delete_=True, type='AdaLog', steps=6, width=16, candidates=128, rounds=3),
    quantizers=dict(
        post_norm=dict(rescale='per_channel'),
        post_gelu=dict(_delete_=True, type='AdaLogQuantizer', rescale='gelu'),
        post_softmax=dict(_delete_=True, type='AdaLogQuantizer', fixed_scale=1.0),
    ))
