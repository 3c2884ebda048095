"""UQ-ViT (AAAI 2026) in full. Bits: --recipe uqvit_w8a8, uqvit_w4a4, ...

DeMax after softmax; NormQuant with shift after LayerNorm, without it before proj and fc2; uniform quantizers only; inputs of each block
from the quantized blocks before it.
"""
_base_ = './minmax.py'

recipe = dict(
    name='uqvit',
    method=dict(_delete_=True, type='UQViT'),
    quantizers=dict(
        post_norm=dict(rescale='per_channel'),
        post_attention=dict(rescale='per_channel'),
        post_gelu=dict(rescale='per_channel'),
        post_softmax=dict(_delete_=True, type='DeMaxQuantizer', side='float16'),
    ))
