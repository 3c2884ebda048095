"""DPT ViT-B/16 with its backbone in UQ-ViT W4A4.

    python MMSEG/tools/test.py configs/mmseg/dpt_vit-b16_uqvit-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './dpt_vit-b16_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
