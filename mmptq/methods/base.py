"""What a method is to the calibration."""
from __future__ import annotations

from typing import Any, ClassVar, Protocol

from ..calibration.capture import Block


def require_positive(method: object, *names: str) -> None:
    """Raises ValueError if one of a method's options is less than 1, naming it."""
    for name in names:
        if getattr(method, name) < 1:
            raise ValueError(f'{name} must be at least 1, not {getattr(method, name)}')


class Method(Protocol):
    """Chooses the parameters of one block's quantizers.

    Attributes:
        rescales: Whether it sets what a recipe's ``rescale`` asks for.
        propagate_error: Whether the next block sees this block's quantized outputs, or those of the float model.
    """

    propagate_error: bool
    rescales: ClassVar[bool]

    def calibrate(self, block: Block) -> list[Any]:
        """Sets the parameters of all quantizers of ``block.ops`` and fills ``block.samples``.

        Returns:
            The block's outputs before that, of the float block, one a call.
        """
        ...
