"""Mask2Former Swin-T with its backbone in AdaLog W4A4.

    python MMSEG/tools/test.py configs/mmseg/mask2former_swin-t_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = 'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
