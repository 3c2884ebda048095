"""UperNet on timm's Swin-T, the demo's data: a pattern for a transformer of timm in any detector or segmentor. See docs/timm.md.

    python MMSEG/tools/train.py configs/timm/upernet_swin-tiny-timm.py --cfg-options model.backbone.pretrained=FILE
    python tools/quantize.py configs/timm/upernet_swin-tiny-timm.py work_dirs/upernet_swin-tiny-timm/iter_9000.pth --recipe adalog_w4a4

FILE has timm's weights, downloaded beforehand.
"""
_base_ = '../demo/upernet_swin-demo.py'

model = dict(
    backbone=dict(
        _delete_=True, type='mmptq.TimmBackbone', model_name='swin_tiny_patch4_window7_224', out_indices=(0, 1, 2, 3),
        always_partition=True),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
