"""IN WHICH ORDER and ON WHICH DATA parameters are chosen."""
from .blockwise import BlockResult, calibrate, calibrate_block, check_weights
from .capture import Block, Call, Samples, Stream, operations
from .search import search

__all__ = ['Block', 'BlockResult', 'Call', 'Samples', 'Stream', 'calibrate', 'calibrate_block', 'check_weights', 'operations', 'search']
