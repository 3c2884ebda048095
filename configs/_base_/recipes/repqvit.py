"""RepQ-ViT (ICCV 2023) of existing parts. Bits: --recipe repqvit_w8a8, repqvit_w4a4, ...

One quantizer per channel after LayerNorm, made one per layer by reparameterisation (UQ-ViT's alpha = 0); log-sqrt2 after softmax.
"""
_base_ = './minmax.py'

recipe = dict(
    name='repqvit',
    method=dict(_delete_=True, type='UQViT', alphas=[0.0], plain_alphas=[None]),
    quantizers=dict(
        post_norm=dict(rescale='per_channel'),
        post_softmax=dict(_delete_=True, type='AdaLogQuantizer', fixed_scale=1.0, fixed_q=18.5),
    ))
