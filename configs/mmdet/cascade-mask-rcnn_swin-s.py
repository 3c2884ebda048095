"""Cascade Mask R-CNN Swin-S of SwinTransformer/Swin-Transformer-Object-Detection. Float; quantized by

    python tools/quantize.py configs/mmdet/cascade-mask-rcnn_swin-s.py CHECKPOINT --recipe adalog_w4a4
"""
_base_ = './cascade-mask-rcnn_swin-t.py'

model = dict(backbone=dict(depths=[2, 2, 18, 2], drop_path_rate=0.2))
