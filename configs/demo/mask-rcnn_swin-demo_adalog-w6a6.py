"""The demo's Mask R-CNN with its backbone in AdaLog W6A6.

    python MMDET/tools/test.py configs/demo/mask-rcnn_swin-demo_adalog-w6a6.py demo/mask-rcnn_swin-demo.pth

Measured: box AP 0.662, mask AP 0.726; none published.
"""
_base_ = './mask-rcnn_swin-demo_adalog-w4a4.py'

model = dict(backbone=dict(recipe='adalog_w6a6'))
