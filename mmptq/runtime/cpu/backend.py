"""The backend of a CPU with VNNI."""

from __future__ import annotations

from torch import Tensor

from ...layers import QuantConv2d, QuantOp
from ..backend import PreparedConvolution, PreparedProduct
from ..coders import Uniform
from ..errors import NoIntegerForm
from ..int8 import WITH_SUMS, int8_parts, int8_path, int8_weight, with_sums
from .block import CpuBlock
from .convolution import OneDnnConvolution
from .product import OneDnnProduct


class OneDnnBackend:
    """oneDNN's products and convolutions of uint8 and int8."""

    block = CpuBlock
    fuses_maps = True

    def product(self, op: QuantOp, integers: Tensor, coder: Uniform) -> PreparedProduct:
        """See :class:`mmptq.runtime.backend.Backend`."""
        weight, parts, path, above = int8_weight(op, integers)
        product = OneDnnProduct(weight, parts, int(coder.zero))
        return PreparedProduct(product, path, above)

    def convolution(
        self, op: QuantConv2d, integers: Tensor, coder: Uniform
    ) -> PreparedConvolution:
        """See :class:`mmptq.runtime.backend.Backend`."""
        parts, zero_point = int8_parts(integers), int(coder.zero)
        if len(parts) == 1:
            convolution = OneDnnConvolution(op, parts[0], zero_point)
            return PreparedConvolution(convolution, int8_path(1))
        if op.groups > 1:
            raise NoIntegerForm(
                'a convolution in groups with a weight that int8 does not hold'
            )
        weight, above = with_sums(op, integers)
        convolution = OneDnnConvolution(op, weight, zero_point)
        return PreparedConvolution(convolution, WITH_SUMS, above)
