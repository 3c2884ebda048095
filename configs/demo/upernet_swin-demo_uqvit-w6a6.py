"""The demo's UperNet with its backbone in UQ-ViT W6A6.

    python MMSEG/tools/test.py configs/demo/upernet_swin-demo_uqvit-w6a6.py demo/upernet_swin-demo.pth

Measured: mIoU 61.28, aAcc 88.36; none published.
"""
_base_ = './upernet_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w6a6'))
