"""Our own for integer hardware: every quantizer is uniform. Bits: --recipe mmptq_w4a4_uniform, mmptq_w3a3_uniform, ...

UQ-ViT's DeMax after softmax, AdaLog's reparameterisation after LayerNorm, its search for all scales and zero points, and inputs of each
block from the quantized blocks before it.
"""
_base_ = './minmax.py'

recipe = dict(
    name='mmptq_uniform',
    method=dict(_delete_=True, type='AdaLog', propagate_error=True),
    quantizers=dict(
        post_norm=dict(rescale='per_channel'),
        post_softmax=dict(_delete_=True, type='DeMaxQuantizer', side='float16'),
    ))
