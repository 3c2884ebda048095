"""UperNet on timm's Swin-T with its backbone in UQ-ViT W4A4.

    python MMSEG/tools/test.py configs/timm/upernet_swin-tiny-timm_uqvit-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './upernet_swin-tiny-timm_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
