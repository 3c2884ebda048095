"""Our own: AdaLog with the inputs of each block from the quantized blocks before it. Bits: --recipe mmptq_w4a4, mmptq_w3a3, ..."""
_base_ = './adalog_propagate.py'

recipe = dict(name='mmptq')
