"""Mask R-CNN on mmsegmentation's ViT-B/16, four levels made from four of its layers. Float; quantized by

    python tools/quantize.py configs/mmdet/mask-rcnn_vit-b16.py CHECKPOINT --recipe adalog_w4a4
"""
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py', 'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py'
]

model = dict(
    backbone=dict(
        _delete_=True, type='mmseg.VisionTransformer', img_size=(1024, 1024), patch_size=16, embed_dims=768, num_layers=12, num_heads=12,
        out_indices=(2, 5, 8, 11), drop_path_rate=0.1, norm_cfg=dict(type='LN', eps=1e-6), interpolate_mode='bicubic'),
    neck=[
        dict(type='mmseg.Feature2Pyramid', embed_dim=768, rescales=[4, 2, 1, 0.5]),
        dict(type='FPN', in_channels=[768] * 4, out_channels=256, num_outs=5),
    ])
