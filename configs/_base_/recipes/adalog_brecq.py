"""AdaLog and then its second stage, the reconstruction of each block (BRECQ). Bits: --recipe adalog_w4a4_brecq, adalog_w3a3_brecq, ...

20,000 steps a block, 32 images each: meant for a GPU, and for the paper's 1,024 images (--calib-images 1024).
"""
_base_ = './adalog.py'

recipe = dict(
    name='adalog_brecq',
    method=dict(type='AdaLogBRECQ', iterations=20000, batch=32, weight_lr=1e-3, scale_lr=4e-5, warmup=0.2))
