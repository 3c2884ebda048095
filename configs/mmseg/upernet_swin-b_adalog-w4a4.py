"""UperNet Swin-B with its backbone in AdaLog W4A4.

    python MMSEG/tools/test.py configs/mmseg/upernet_swin-b_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = 'mmseg::swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
