"""The backend of any device: ``torch._int_mm``, which is exact everywhere, and slow on
a CPU.
"""

from __future__ import annotations

from torch import Tensor

from ..layers import QuantConv2d, QuantOp
from .backend import PreparedConvolution, PreparedProduct
from .coders import Uniform
from .cpu.block import CpuBlock
from .errors import NoIntegerForm
from .int8 import int8_weight
from .products import IntMM


class PortableBackend:
    """For a CPU without VNNI, and for a GPU without Triton.

    Args:
        fuses: Whether blocks, patch mergings and output norms are fused, which pays on
            a CPU.
    """

    def __init__(self, fuses: bool) -> None:
        self.block = CpuBlock if fuses else None
        self.fuses_maps = fuses

    def product(self, op: QuantOp, integers: Tensor, coder: Uniform) -> PreparedProduct:
        """See :class:`mmptq.runtime.backend.Backend`."""
        weight, parts, path, above = int8_weight(op, integers)
        product = IntMM(weight, parts, int(coder.zero))
        return PreparedProduct(product, f'{path}, by _int_mm', above)

    def convolution(
        self, op: QuantConv2d, integers: Tensor, coder: Uniform
    ) -> PreparedConvolution:
        """Torch has none.

        Raises:
            NoIntegerForm: Always.
        """
        raise NoIntegerForm('integer convolutions need oneDNN and a CPU with VNNI')
