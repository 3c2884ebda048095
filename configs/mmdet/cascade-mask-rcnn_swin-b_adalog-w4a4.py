"""Cascade Mask R-CNN Swin-B with its backbone in AdaLog W4A4.

    python MMDET/tools/test.py configs/mmdet/cascade-mask-rcnn_swin-b_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './cascade-mask-rcnn_swin-b.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
