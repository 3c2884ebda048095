"""Cascade Mask R-CNN Swin-T with its backbone in UQ-ViT W4A4.

    python MMDET/tools/test.py configs/mmdet/cascade-mask-rcnn_swin-t_uqvit-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './cascade-mask-rcnn_swin-t_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
