"""WHAT a tensor becomes."""
from .adalog import AdaLogQuantizer
from .base import Params, Quantizer
from .uniform import UniformQuantizer

__all__ = ['AdaLogQuantizer', 'Params', 'Quantizer', 'UniformQuantizer']
