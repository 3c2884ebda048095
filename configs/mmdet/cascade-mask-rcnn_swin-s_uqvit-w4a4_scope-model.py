"""Cascade Mask R-CNN Swin-S in UQ-ViT W4A4, neck and heads too.

    python MMDET/tools/test.py configs/mmdet/cascade-mask-rcnn_swin-s_uqvit-w4a4_scope-model.py CHECKPOINT

Published: box AP 49.6, mask AP 43.4 (checkpoint of Swin's authors, calibrated on validation images, inputs of convolutions at 8 bits).
Not measured.
"""
_base_ = './cascade-mask-rcnn_swin-s_adalog-w4a4_scope-model.py'

model = dict(recipe='uqvit_w4a4')
