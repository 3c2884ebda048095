"""Segmenter ViT-S/16 with its backbone in AdaLog W4A4.

    python MMSEG/tools/test.py configs/mmseg/segmenter_vit-s16_adalog-w4a4.py CHECKPOINT

Not measured; none published.
"""
_base_ = 'mmseg::segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512.py'

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook')]
