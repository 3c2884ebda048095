"""UperNet ViT-B/16 (MultiLevelNeck) with its backbone in AdaLog W4A4.

    python MMSEG/tools/test.py configs/mmseg/upernet_vit-b16-mln_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = 'mmseg::vit/vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
