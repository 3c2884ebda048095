"""UQ-ViT with alphas compared on 8 of the calibration images. Bits: --recipe uqvit_w8a8_fast, uqvit_w4a4_fast, ..."""
_base_ = './uqvit.py'

recipe = dict(name='uqvit_fast', method=dict(images=8, rows=1024))
