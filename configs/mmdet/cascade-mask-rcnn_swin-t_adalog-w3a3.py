"""Cascade Mask R-CNN Swin-T with its backbone in AdaLog W3A3.

    python MMDET/tools/test.py configs/mmdet/cascade-mask-rcnn_swin-t_adalog-w3a3.py CHECKPOINT

Not measured; none published.
"""
_base_ = './cascade-mask-rcnn_swin-t_adalog-w4a4.py'

model = dict(backbone=dict(recipe='adalog_w3a3'))
