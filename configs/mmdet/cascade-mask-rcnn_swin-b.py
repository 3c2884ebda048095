"""Cascade Mask R-CNN Swin-B of SwinTransformer/Swin-Transformer-Object-Detection. Float; quantized by

    python tools/quantize.py configs/mmdet/cascade-mask-rcnn_swin-b.py CHECKPOINT --recipe adalog_w4a4
"""
_base_ = './cascade-mask-rcnn_swin-s.py'

model = dict(
    backbone=dict(embed_dims=128, num_heads=[4, 8, 16, 32], drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]))
