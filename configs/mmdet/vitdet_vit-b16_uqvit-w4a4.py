"""ViTDet (Mask R-CNN on ViT-B/16) with its backbone in UQ-ViT W4A4.

    MMDET=CHECKOUT PYTHONPATH=CHECKOUT python CHECKOUT/tools/test.py configs/mmdet/vitdet_vit-b16_uqvit-w4a4.py CHECKPOINT

CHECKOUT is the absolute path of a checkout of mmdetection. Not measured; none published.
"""
_base_ = './vitdet_vit-b16_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
