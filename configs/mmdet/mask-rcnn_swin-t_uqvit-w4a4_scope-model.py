"""Mask R-CNN Swin-T in UQ-ViT W4A4, neck and heads too.

    python MMDET/tools/test.py configs/mmdet/mask-rcnn_swin-t_uqvit-w4a4_scope-model.py CHECKPOINT

Published: box AP 39.0, mask AP 37.3 (checkpoint of Swin's authors, calibrated on validation images, inputs of convolutions at 8 bits).
Not measured.
"""
_base_ = './mask-rcnn_swin-t_adalog-w4a4_scope-model.py'

model = dict(recipe='uqvit_w4a4')
