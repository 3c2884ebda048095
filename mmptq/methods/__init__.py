"""HOW parameters are chosen: one paper, one file."""
from .adalog import AdaLog
from .base import Method
from .brecq import AdaLogBRECQ
from .minmax import MinMax

__all__ = ['AdaLog', 'AdaLogBRECQ', 'Method', 'MinMax']
