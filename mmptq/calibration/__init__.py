"""IN WHICH ORDER and ON WHICH DATA parameters are chosen."""

from .blockwise import (
    BlockResult,
    calibrate,
    calibrate_block,
    check_weights,
    run_stages,
)
from .capture import Block, Call, Samples, Stream, operations
from .objective import Gram, Objective, Screen
from .search import FPCS, fpcs, search, search_weight
from .stage import Needs, Stage

__all__ = [
    'FPCS',
    'Block',
    'BlockResult',
    'Call',
    'Gram',
    'Needs',
    'Objective',
    'Samples',
    'Screen',
    'Stage',
    'Stream',
    'calibrate',
    'calibrate_block',
    'check_weights',
    'fpcs',
    'operations',
    'run_stages',
    'search',
    'search_weight',
]
