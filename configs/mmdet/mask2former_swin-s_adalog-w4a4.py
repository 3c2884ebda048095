"""Mask2Former Swin-S with its backbone in AdaLog W4A4.

    python MMDET/tools/test.py configs/mmdet/mask2former_swin-s_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = 'mmdet::mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
