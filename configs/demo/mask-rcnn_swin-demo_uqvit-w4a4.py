"""The demo's Mask R-CNN with its backbone in UQ-ViT W4A4.

    python MMDET/tools/test.py configs/demo/mask-rcnn_swin-demo_uqvit-w4a4.py demo/mask-rcnn_swin-demo.pth

Measured: box AP 0.652, mask AP 0.715; none published.
"""
_base_ = './mask-rcnn_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='uqvit_w4a4'))
