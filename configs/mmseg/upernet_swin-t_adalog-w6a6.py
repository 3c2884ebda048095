"""UperNet Swin-T with its backbone in AdaLog W6A6.

    python MMSEG/tools/test.py configs/mmseg/upernet_swin-t_adalog-w6a6.py CHECKPOINT

Not measured; none published.
"""
_base_ = './upernet_swin-t_adalog-w4a4.py'

model = dict(backbone=dict(recipe='adalog_w6a6'))
