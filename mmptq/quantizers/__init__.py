"""WHAT a tensor becomes."""

from .adalog import AdaLogQuantizer
from .base import Calibrated, Float, Grid, Params, Quantizer, calibrated_parts
from .demax import DeMaxQuantizer
from .uniform import UniformQuantizer

__all__ = [
    'AdaLogQuantizer',
    'Calibrated',
    'DeMaxQuantizer',
    'Float',
    'Grid',
    'Params',
    'Quantizer',
    'UniformQuantizer',
    'calibrated_parts',
]
