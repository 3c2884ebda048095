"""The one exception that means: this stays simulated."""
from __future__ import annotations

from ..errors import printable


class NoIntegerForm(Exception):  # noqa: N818 - it is a reason, not an error
    """An operation, a block or a quantizer has no form in integers; the text is the reason.

    It is not an error of the user's: ``to_integer`` reports it and leaves the operation as it is.
    Every other exception is one, or a bug, and is never passed over.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))
