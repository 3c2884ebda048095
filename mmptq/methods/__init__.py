"""HOW parameters are chosen: one paper, one file."""
from .adalog import AdaLog
from .base import Method
from .brecq import AdaLogBRECQ
from .minmax import MinMax
from .uqvit import UQViT

__all__ = ['AdaLog', 'AdaLogBRECQ', 'Method', 'MinMax', 'UQViT']
