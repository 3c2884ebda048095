"""The demo's Mask R-CNN with its backbone in UQ-ViT W3A3.

    python MMDET/tools/test.py configs/demo/mask-rcnn_swin-demo_uqvit-w3a3.py demo/mask-rcnn_swin-demo.pth

Measured: box AP 0.513, mask AP 0.503; none published.
"""
_base_ = './mask-rcnn_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w3a3'))
