"""The one exception that means: this stays simulated."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import printable
from ..quantizers.dispatch import Entry, entry_for


class NoIntegerForm(Exception):  # noqa: N818 - it is a reason, not an error
    """An operation, a block or a quantizer has no form in integers; the text is the
    reason.

    It is not an error of the user's: ``to_integer`` reports it and leaves the operation
    as it is. Every other exception is one, or a bug, and is never passed over.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def required(table: Mapping[type, Entry], item: object, name: str) -> Entry:
    """A table's entry for the class of an object
    (:func:`mmptq.quantizers.dispatch.entry_for`).

    Args:
        table: Entries by class.
        item: A quantizer, or another object that the table is about.
        name: The table's full name, which the message says.

    Raises:
        NoIntegerForm: If there is none: it says which table lacks which class.
    """
    entry = entry_for(table, item)
    if entry is None:
        raise NoIntegerForm(f'{type(item).__name__} has no entry in {name}')
    return entry
