"""Cascade Mask R-CNN Swin-T of SwinTransformer/Swin-Transformer-Object-Detection. Float; quantized by

    python tools/quantize.py configs/mmdet/cascade-mask-rcnn_swin-t.py CHECKPOINT --recipe adalog_w4a4
"""
_base_ = [
    '../_base_/models/cascade-mask-rcnn_swin_4conv1fc-giou.py', 'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py'
]
