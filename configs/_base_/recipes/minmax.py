"""Min-max uniform quantization everywhere: the floor. Bits: --recipe minmax_w8a8, minmax_w4a4, ..."""
_uniform = dict(type='UniformQuantizer')
_per_head = dict(type='UniformQuantizer', per_head=True)

recipe = dict(
    name='minmax',
    bits=dict(weight=8, activation=8),
    method=dict(type='MinMax'),
    quantizers=dict(
        weight=dict(type='UniformQuantizer', per_channel=True),
        image=dict(type='UniformQuantizer', bits=8),
        post_norm=_uniform,
        post_attention=_uniform,
        post_gelu=_uniform,
        query=_per_head,
        key=_per_head,
        post_softmax=_uniform,
        value=_per_head,
        conv=_uniform,
        linear=_uniform,
    ))
