"""Mask R-CNN Swin-S with its backbone in AdaLog W3A3.

    python MMDET/tools/test.py configs/mmdet/mask-rcnn_swin-s_adalog-w3a3.py CHECKPOINT

Not measured; none published.
"""
_base_ = './mask-rcnn_swin-s_adalog-w4a4.py'

model = dict(backbone=dict(recipe='adalog_w3a3'))
