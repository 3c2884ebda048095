"""The demo's UperNet with its backbone in UQ-ViT W4A4.

    python MMSEG/tools/test.py configs/demo/upernet_swin-demo_uqvit-w4a4.py demo/upernet_swin-demo.pth

Measured: mIoU 60.14, aAcc 87.85; none published.
"""
_base_ = './upernet_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
