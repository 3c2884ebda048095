"""What a method is to the calibration."""
from __future__ import annotations

from typing import Any, Protocol

from ..calibration.capture import Block


class Method(Protocol):
    """Chooses the parameters of one block's quantizers.

    Attributes:
        propagate_error: Whether the next block sees this block's quantized outputs, or those of the float model.
    """

    propagate_error: bool

    def calibrate(self, block: Block) -> list[Any]:
        """Sets the parameters of all quantizers of ``block.ops`` and fills ``block.samples``.

        Returns:
            The block's outputs before that, of the float block, one a call.
        """
        ...
