"""WHERE tensors are quantized."""
from .attention import SelfAttention, extend_attention
from .ops import QuantConv2d, QuantLinear, QuantMatMul, QuantOp

__all__ = ['QuantConv2d', 'QuantLinear', 'QuantMatMul', 'QuantOp', 'SelfAttention', 'extend_attention']
