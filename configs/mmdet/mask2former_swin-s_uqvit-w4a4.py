"""Mask2Former Swin-S with its backbone in UQ-ViT W4A4.

    python MMDET/tools/test.py configs/mmdet/mask2former_swin-s_uqvit-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './mask2former_swin-s_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
