"""AdaLog with a coarser search, on fewer tokens. Bits: --recipe adalog_w8a8_fast, adalog_w4a4_fast, ..."""
_base_ = './adalog.py'

recipe = dict(name='adalog_fast', method=dict(steps=2, width=8, candidates=64, rank=16, rounds=1, rows=2048, thin=16))
