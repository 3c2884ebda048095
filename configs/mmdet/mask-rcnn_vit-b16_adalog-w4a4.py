"""Mask R-CNN on mmsegmentation's ViT-B/16 with its backbone in AdaLog W4A4.

    python MMDET/tools/test.py configs/mmdet/mask-rcnn_vit-b16_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './mask-rcnn_vit-b16.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
