custom_hooks = [
    dict(type='mmptq.PTQHook'),
]
default_scope = 'mmseg'
model = dict(
    backbone=dict(
        backbone=dict(
            depths=(
                1,
                1,
            ),
            drop_path_rate=0.1,
            embed_dims=8,
            mlp_ratio=2,
            num_heads=(
                1,
                2,
            ),
            out_indices=(
                0,
                1,
            ),
            strides=(
                4,
                2,
            ),
            type='SwinTransformer',
            window_size=4),
        recipe=dict(
            bits=dict(activation=4, softmax=4, weight=4),
            method=dict(
                all_tokens=False,
                candidates=48,
                rank=16,
                rounds=1,
                rows=2048,
                screen=96,
                steps=3,
                type='AdaLog',
                width=6),
            name='adalog_w4a4_fast',
            quantizers=dict(
                conv=dict(type='UniformQuantizer'),
                image=dict(bits=8, type='UniformQuantizer'),
                key=dict(per_head=True, type='UniformQuantizer'),
                linear=dict(type='UniformQuantizer'),
                post_attention=dict(type='UniformQuantizer'),
                post_gelu=dict(rescale='gelu', type='AdaLogQuantizer'),
                post_norm=dict(rescale='per_channel', type='UniformQuantizer'),
                post_softmax=dict(fixed_scale=1.0, type='AdaLogQuantizer'),
                query=dict(per_head=True, type='UniformQuantizer'),
                value=dict(per_head=True, type='UniformQuantizer'),
                weight=dict(per_channel=True, type='UniformQuantizer'))),
        type='mmptq.QuantBackbone'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        pad_val=0,
        seg_pad_val=255,
        size=(
            128,
            128,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        test_cfg=dict(size_divisor=4),
        type='SegDataPreProcessor'),
    decode_head=dict(
        channels=8,
        in_channels=16,
        in_index=1,
        loss_decode=dict(type='CrossEntropyLoss'),
        norm_cfg=dict(requires_grad=True, type='BN'),
        num_classes=9,
        num_convs=1,
        type='FCNHead'),
    test_cfg=dict(mode='whole'),
    train_cfg=dict(),
    type='EncoderDecoder')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(reduce_zero_label=True, type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
