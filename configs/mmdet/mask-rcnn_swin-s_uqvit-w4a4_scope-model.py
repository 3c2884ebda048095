"""Mask R-CNN Swin-S in UQ-ViT W4A4, neck and heads too.

    python MMDET/tools/test.py configs/mmdet/mask-rcnn_swin-s_uqvit-w4a4_scope-model.py CHECKPOINT

Published: box AP 43.3, mask AP 40.3 (checkpoint of Swin's authors, calibrated on validation images, inputs of convolutions at 8 bits).
Not measured.
"""
_base_ = 'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'

model = dict(_delete_=True, type='mmptq.QuantModel', recipe='uqvit_w4a4', model={{_base_.model}})
custom_hooks = [dict(type='mmptq.PTQHook')]
