"""AdaLog with the inputs of each block from the quantized blocks before it. Bits: --recipe adalog_w4a4_propagate, ..."""
_base_ = './adalog.py'

recipe = dict(name='adalog_propagate', method=dict(propagate_error=True))
