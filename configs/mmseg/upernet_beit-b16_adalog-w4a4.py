"""UperNet BEiT-B/16 with its backbone in AdaLog W4A4.

    python MMSEG/tools/test.py configs/mmseg/upernet_beit-b16_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = 'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py'

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
