"""IN WHICH ORDER and ON WHICH DATA parameters are chosen."""
from .blockwise import BlockResult, calibrate, calibrate_block, check_weights
from .capture import Block, Call, Samples, Stream, operations
from .objective import Gram, Objective, Screen
from .search import FPCS, fpcs, search, search_weight

__all__ = ['FPCS', 'Block', 'BlockResult', 'Call', 'Gram', 'Objective', 'Samples', 'Screen', 'Stream', 'calibrate', 'calibrate_block',
           'check_weights', 'fpcs', 'operations', 'search', 'search_weight']
