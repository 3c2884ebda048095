"""The demo's UperNet with its backbone in UQ-ViT W3A3.

    python MMSEG/tools/test.py configs/demo/upernet_swin-demo_uqvit-w3a3.py demo/upernet_swin-demo.pth

Measured: mIoU 43.35, aAcc 80.83; none published.
"""
_base_ = './upernet_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w3a3'))
