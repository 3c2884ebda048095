"""Mask R-CNN Swin-T in AdaLog W4A4, neck and heads too.

    python MMDET/tools/test.py configs/mmdet/mask-rcnn_swin-t_adalog-w4a4_scope-model.py CHECKPOINT

Published: box AP 39.1 (checkpoint of Swin's authors).
Not measured.
"""
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'

model = dict(_delete_=True, type='mmptq.QuantModel', recipe='adalog_w4a4', model={{_base_.model}})
custom_hooks = [dict(type='mmptq.PTQHook')]
