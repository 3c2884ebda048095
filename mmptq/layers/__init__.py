"""WHERE tensors are quantized."""

from .attention import SelfAttention, extend_attention
from .ops import Places, QuantConv2d, QuantLinear, QuantMatMul, QuantOp, prefer_large
from .rescale import RESCALES, GeluShift, Rescale, largest_rescale, per_channel_rescale

__all__ = [
    'RESCALES',
    'GeluShift',
    'Places',
    'QuantConv2d',
    'QuantLinear',
    'QuantMatMul',
    'QuantOp',
    'Rescale',
    'SelfAttention',
    'extend_attention',
    'largest_rescale',
    'per_channel_rescale',
    'prefer_large',
]
