"""HOW parameters are chosen: one paper, one file."""

from .adalog import AdaLog
from .adalog_brecq import AdaLogBRECQ
from .brecq import BRECQ
from .minmax import MinMax
from .uqvit import UQViT

__all__ = ['BRECQ', 'AdaLog', 'AdaLogBRECQ', 'MinMax', 'UQViT']
