"""What a method is to the calibration."""
from __future__ import annotations

from typing import Any, ClassVar, Protocol

from ..calibration.capture import Block


def require_positive(method: object, *names: str) -> None:
    """Raises ValueError if one of a method's options is not a whole number of at least 1, naming it."""
    for name in names:
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be a whole number and at least 1, not {value!r}')


def require_flags(method: object, *names: str) -> None:
    """Raises ValueError if one of a method's options is neither True nor False, naming it."""
    for name in names:
        if not isinstance(getattr(method, name), bool):
            raise ValueError(f'{name} must be True or False, not {getattr(method, name)!r}')


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
