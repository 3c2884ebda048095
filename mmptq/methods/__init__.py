"""HOW parameters are chosen: one paper, one file."""
from .adalog import AdaLog
from .base import Method
from .minmax import MinMax

__all__ = ['AdaLog', 'Method', 'MinMax']
