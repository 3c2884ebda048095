"""Cascade Mask R-CNN Swin-S in AdaLog W4A4, neck and heads too.

    python MMDET/tools/test.py configs/mmdet/cascade-mask-rcnn_swin-s_adalog-w4a4_scope-model.py CHECKPOINT

Published: box AP 50.6 (checkpoint of Swin's authors).
Not measured.
"""
_base_ = './cascade-mask-rcnn_swin-s.py'

model = dict(_delete_=True, type='mmptq.QuantModel', recipe='adalog_w4a4', model={{_base_.model}})
custom_hooks = [dict(type='mmptq.PTQHook')]
