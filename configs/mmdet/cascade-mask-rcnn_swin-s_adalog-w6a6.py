"""Cascade Mask R-CNN Swin-S with its backbone in AdaLog W6A6.

    python MMDET/tools/test.py configs/mmdet/cascade-mask-rcnn_swin-s_adalog-w6a6.py CHECKPOINT

Not measured; none published.
"""
_base_ = './cascade-mask-rcnn_swin-s_adalog-w4a4.py'

model = dict(backbone=dict(recipe='adalog_w6a6'))
