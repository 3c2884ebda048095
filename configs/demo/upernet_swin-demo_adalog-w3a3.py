"""The demo's UperNet with its backbone in AdaLog W3A3.

    python MMSEG/tools/test.py configs/demo/upernet_swin-demo_adalog-w3a3.py demo/upernet_swin-demo.pth

Measured: mIoU 51.32, aAcc 84.49; none published.
"""
_base_ = './upernet_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='adalog_w3a3'))
