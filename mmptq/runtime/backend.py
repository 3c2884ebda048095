"""What a device brings to the integer runtime; ``to_integer`` chooses it once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from ..layers import QuantConv2d, QuantOp
from .coders import Uniform
from .products import Product

if TYPE_CHECKING:
    from .blocks import IntegerBlock


class Convolution(Protocol):
    """A convolution of codes with a weight's integers."""

    def __call__(self, codes: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """``sums gain + bias``, float32, from padded codes (batch, channels, height,
        width).
        """


class PreparedProduct(NamedTuple):
    """A product that is ready to run.

    Attributes:
        product: From codes to outputs.
        path: For the report.
        above: What the integers lack, (out,), where the product has
            :data:`mmptq.runtime.int8.SUMS` more outputs, the first of them the sum of
            the codes; None where the outputs are all there is.
    """

    product: Product
    path: str
    above: Tensor | None = None


class PreparedConvolution(NamedTuple):
    """A convolution that is ready to run; attributes as for :class:`PreparedProduct`."""

    convolution: Convolution
    path: str
    above: Tensor | None = None


class Backend(Protocol):
    """Products, convolutions and blocks of a device."""

    @property
    def block(self) -> type[IntegerBlock] | None:
        """The fused form of a transformer block; None if there is none."""

    @property
    def fuses_maps(self) -> bool:
        """Whether patch mergings and output norms have fused forms too."""

    def product(self, op: QuantOp, integers: Tensor, coder: Uniform) -> PreparedProduct:
        """The product of codes with a weight's integers.

        Args:
            op: The layer, which knows the zero points of its weight.
            integers: The weight's, (out, in), in the order in which inputs come.
            coder: Of the inputs.

        Raises:
            NoIntegerForm: If there is none that is exact.
        """

    def convolution(
        self, op: QuantConv2d, integers: Tensor, coder: Uniform
    ) -> PreparedConvolution:
        """The convolution of codes with a weight's integers, of the weight's own shape.

        Raises:
            NoIntegerForm: If there is none that is exact.
        """
