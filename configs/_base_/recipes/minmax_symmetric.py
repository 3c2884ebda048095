"""Min-max with weights symmetric about zero, which int8 holds whole: the fastest in integers. Bits: --recipe minmax_w8a8_symmetric, ..."""
_base_ = './minmax.py'

recipe = dict(name='minmax_symmetric', quantizers=dict(weight=dict(symmetric=True)))
