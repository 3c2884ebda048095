"""AdaLog W4A4 without one of its parts: one grid of 128 candidates, no refinement."""

_base_ = '../../configs/_base_/recipes/adalog.py'

recipe = dict(name='no_fpcs', bits=dict(weight=4, activation=4), method=dict(steps=1))
