"""ViTDet (Mask R-CNN on ViT-B/16) with its backbone in AdaLog W4A4.

    MMDET=CHECKOUT PYTHONPATH=CHECKOUT python CHECKOUT/tools/test.py configs/mmdet/vitdet_vit-b16_adalog-w4a4.py CHECKPOINT

CHECKOUT is the absolute path of a checkout of mmdetection. Not measured; none published.
"""
_base_ = '{{$MMDET:MMDET}}/projects/ViTDet/configs/vitdet_mask-rcnn_vit-b-mae_lsj-100e.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
