"""Mask R-CNN Swin-T with its backbone in UQ-ViT W6A6.

    python MMDET/tools/test.py configs/mmdet/mask-rcnn_swin-t_uqvit-w6a6.py CHECKPOINT

Not measured; none published.
"""
_base_ = './mask-rcnn_swin-t_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w6a6'))
