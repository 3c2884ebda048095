"""The demo's Mask R-CNN with its backbone in UQ-ViT W6A6.

    python MMDET/tools/test.py configs/demo/mask-rcnn_swin-demo_uqvit-w6a6.py demo/mask-rcnn_swin-demo.pth

Measured: box AP 0.667, mask AP 0.725; none published.
"""
_base_ = './mask-rcnn_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w6a6'))
