"""The backend of a GPU with Triton."""

from __future__ import annotations

from torch import Tensor

from ...layers import QuantConv2d, QuantOp
from ..backend import PreparedConvolution, PreparedProduct
from ..coders import Uniform
from ..errors import NoIntegerForm
from .block import GpuBlock
from .convolution import FieldsConvolution
from .product import GpuProduct

PATH = 'int8, by Triton'


class TritonBackend:
    """Kernels in Triton; a weight that int8 does not hold takes no more outputs or
    passes there.
    """

    block = GpuBlock
    fuses_maps = False

    def product(self, op: QuantOp, integers: Tensor, coder: Uniform) -> PreparedProduct:
        """See :class:`mmptq.runtime.backend.Backend`."""
        return PreparedProduct(GpuProduct(integers, int(coder.zero), coder.most), PATH)

    def convolution(
        self, op: QuantConv2d, integers: Tensor, coder: Uniform
    ) -> PreparedConvolution:
        """See :class:`mmptq.runtime.backend.Backend`."""
        if op.groups > 1:
            raise NoIntegerForm('a convolution in groups on a GPU')
        product = GpuProduct(integers.flatten(1), int(coder.zero), coder.most)
        return PreparedConvolution(FieldsConvolution(op, product), PATH)
