"""The demo's UperNet with its backbone in AdaLog W4A4: a config for the stock test tool of mmsegmentation, and a pattern for others.

    python MMSEG/tools/test.py configs/demo/upernet_swin-demo_adalog-w4a4.py demo/upernet_swin-demo.pth

calibrates on 16 train images, evaluates, and writes quantized.pth and summary.json to its work_dir.
Measured: mIoU 60.77, aAcc 88.06; none published.
"""
_base_ = './upernet_swin-demo.py'

model = dict(backbone=dict(
    _delete_=True, type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone={{_base_.model.backbone}}))
custom_hooks = [dict(type='mmptq.PTQHook', images=16)]
