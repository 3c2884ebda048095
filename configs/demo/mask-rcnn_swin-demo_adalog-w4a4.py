"""The demo's Mask R-CNN with its backbone in AdaLog W4A4: a config for the stock test tool of mmdet, and a pattern for others.

    python MMDET/tools/test.py configs/demo/mask-rcnn_swin-demo_adalog-w4a4.py demo/mask-rcnn_swin-demo.pth

calibrates on 16 train images, evaluates, and writes quantized.pth and summary.json to its work_dir.
Measured: box AP 0.656, mask AP 0.719; none published.
"""
_base_ = './mask-rcnn_swin-demo.py'

model = dict(backbone=dict(
    _delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook', images=16)]
