"""UperNet on a thin Swin (1.5 M parameters in the backbone), the demo's data: 6 kinds of objects, 3 of ground.

Stock mmsegmentation. `python demo/generate_data.py` (part of `make demo`) makes the data.
demo/upernet_swin-demo.pth, on the val split (100 images): mIoU 61.27, aAcc 88.37.
Its training, 9000 iterations from scratch, seed 0, log demo/upernet_swin-demo.log:
    python demo/train.py configs/demo/upernet_swin-demo.py --threads 1
"""
_base_ = '../_base_/demo_runtime.py'

custom_imports = dict(
    imports=['mmseg.models', 'mmseg.datasets', 'mmseg.evaluation', 'mmseg.engine', 'mmseg.visualization'],
    allow_failed_imports=False,
)
default_scope = 'mmseg'
data_root = '{{ fileDirname }}/../../demo/data/'
metainfo = dict(
    classes=(
        'striped_disc', 'checked_disc', 'dotted_disc', 'striped_box', 'checked_box', 'dotted_box',
        'clouds', 'grain', 'waves',
    ),
    palette=[
        [220, 20, 60], [255, 140, 0], [50, 205, 50], [0, 128, 0], [0, 191, 255], [30, 60, 220],
        [180, 180, 180], [120, 100, 80], [70, 130, 130],
    ],
)
norm_cfg = dict(type='BN', requires_grad=True)
crop_size = (128, 128)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
        test_cfg=dict(size_divisor=4),
    ),
    backbone=dict(
        type='SwinTransformer',
        pretrain_img_size=160,
        embed_dims=24,
        depths=(2, 2, 4, 2),
        num_heads=(1, 2, 4, 8),
        window_size=7,
        drop_path_rate=0.0,
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[24, 48, 96, 192],
        in_index=[0, 1, 2, 3],
        pool_scales=(2, 3, 6),
        channels=48,
        dropout_ratio=0.0,
        num_classes=9,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=96,
        in_index=2,
        channels=32,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=9,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(184, 184), ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
dataset_type = 'BaseSegDataset'
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='train', seg_map_path='annotations_seg/train'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        reduce_zero_label=True,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='val', seg_map_path='annotations_seg/val'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        reduce_zero_label=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

max_iters = 9000
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.0),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=3000)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
