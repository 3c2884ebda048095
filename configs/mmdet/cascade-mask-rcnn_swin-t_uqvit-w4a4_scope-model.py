"""Cascade Mask R-CNN Swin-T in UQ-ViT W4A4, neck and heads too.

    python MMDET/tools/test.py configs/mmdet/cascade-mask-rcnn_swin-t_uqvit-w4a4_scope-model.py CHECKPOINT

Published: box AP 47.3, mask AP 41.6 (checkpoint of Swin's authors, calibrated on validation images, inputs of convolutions at 8 bits).
Not measured.
"""
_base_ = './cascade-mask-rcnn_swin-t.py'

model = dict(_delete_=True, type='mmptq.QuantModel', recipe='uqvit_w4a4', model={{_base_.model}})
custom_hooks = [dict(type='mmptq.PTQHook')]
