"""DINO Swin-L with its backbone in UQ-ViT W4A4.

    python MMDET/tools/test.py configs/mmdet/dino_swin-l_uqvit-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './dino_swin-l_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
