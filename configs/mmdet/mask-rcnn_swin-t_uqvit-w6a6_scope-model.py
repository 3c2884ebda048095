"""Mask R-CNN Swin-T in UQ-ViT W6A6, neck and heads too.

    python MMDET/tools/test.py configs/mmdet/mask-rcnn_swin-t_uqvit-w6a6_scope-model.py CHECKPOINT

Published: box AP 45.6, mask AP 41.4 (checkpoint of Swin's authors, calibrated on validation images, inputs of convolutions at 8 bits).
Not measured.
"""
_base_ = './mask-rcnn_swin-t_adalog-w4a4_scope-model.py'

model = dict(recipe='uqvit_w6a6')
