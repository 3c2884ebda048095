"""UperNet on timm's Swin-T with its backbone in AdaLog W4A4.

    python MMSEG/tools/test.py configs/timm/upernet_swin-tiny-timm_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = './upernet_swin-tiny-timm.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
