"""AdaLog with a coarser search, on fewer tokens. Bits: --recipe adalog_w8a8_fast, adalog_w4a4_fast, ..."""
_base_ = './adalog.py'

recipe = dict(name='adalog_fast', method=dict(steps=3, width=6, candidates=48, rank=16, rounds=1, rows=2048, screen=96, all_tokens=False))
