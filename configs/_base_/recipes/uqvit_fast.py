"""UQ-ViT with every other alpha, compared on 8 of the calibration images, inputs from the float model. Bits: --recipe uqvit_w4a4_fast, ..."""
_base_ = './uqvit.py'

recipe = dict(
    name='uqvit_fast',
    method=dict(images=8, rows=1024, alphas=[0.0, 0.1, 0.2], plain_alphas=[None, 0.0, 0.2, 0.4, 0.6, 0.8], propagate_error=False))
