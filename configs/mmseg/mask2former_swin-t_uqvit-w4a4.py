"""Mask2Former Swin-T with its backbone in UQ-ViT W4A4.

    python MMSEG/tools/test.py configs/mmseg/mask2former_swin-t_uqvit-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './mask2former_swin-t_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
