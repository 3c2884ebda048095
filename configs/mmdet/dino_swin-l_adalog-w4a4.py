"""DINO Swin-L with its backbone in AdaLog W4A4.

    python MMDET/tools/test.py configs/mmdet/dino_swin-l_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = 'mmdet::dino/dino-5scale_swin-l_8xb2-36e_coco.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
