"""The demo's UperNet with its backbone in AdaLog W6A6.

    python MMSEG/tools/test.py configs/demo/upernet_swin-demo_adalog-w6a6.py demo/upernet_swin-demo.pth

Measured: mIoU 61.36, aAcc 88.4; none published.
"""
_base_ = './upernet_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='adalog_w6a6'))
