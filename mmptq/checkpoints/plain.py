"""Plain data: what a file may say beside its tensors."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from ..errors import QuantizationError

MOST_VALUES = 200_000
"""Values that a file may hold beside its tensors; more of them are no description of a
model.
"""

MOST_LEVELS = 40
"""How deep they may be nested."""

MOST_CHARACTERS = 4_000_000
"""Length of all texts together, each counted where it stands: one that is shared stands
in many places.
"""

LONGEST_TEXT = 10_000

LARGEST = 2**63
"""The magnitude below which whole numbers lie, those that every reader of JSON takes.
"""


def plain(value: Any, what: str) -> Any:
    """A fresh copy of data that came from a file: numbers, text, lists, tuples and
    dicts of these.

    Nothing else passes, and no subclass: a dict of another class may answer with
    something else than it holds. The copy of a tree whose branches are shared, or of
    one that holds itself, would be endless, so values are counted.

    Args:
        value: The data.
        what: What it is, for messages.

    Raises:
        QuantizationError: If there is something else in it, or too much, naming the
            place.
    """
    return _Copy().of(value, what, 0)


def plain_parts(value: Any, what: str) -> dict[str, Any]:
    """The entries of a dict that are plain data; nothing where it is no dict.

    For what a file says that no one relies on, such as the classes of its data set: an
    entry that is something else, a map of numbers say, is left out.
    """
    result: dict[str, Any] = {}
    copy = _Copy()
    for key, item in dict.items(value) if type(value) in (dict, OrderedDict) else ():
        try:
            result.update(copy.of({key: item}, what, 0))
        except QuantizationError:
            continue
    return result


class _Copy:
    """One copy, which counts."""

    def __init__(self) -> None:
        self.count = 0
        self.characters = 0

    def of(self, value: Any, where: str, level: int) -> Any:
        self.count += 1
        self.characters += len(value) if type(value) is str else 0
        if (
            self.count > MOST_VALUES
            or self.characters > MOST_CHARACTERS
            or level > MOST_LEVELS
        ):
            raise QuantizationError(
                f'{where[:200]}: the file holds too much beside its tensors'
            )
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int and abs(value) < LARGEST:
            return value
        if kind is float and math.isfinite(value):
            return value
        if kind is str and len(value) <= LONGEST_TEXT and _is_text(value):
            return value
        if kind in (list, tuple):
            items = enumerate(value)
            return kind(
                self.of(item, f'{where}.{number}', level + 1) for number, item in items
            )
        if kind in (dict, OrderedDict):
            return {
                self.key(key, where): self.of(
                    item, f'{where}.{str(key)[:50]}', level + 1
                )
                for key, item in dict.items(value)
            }
        raise QuantizationError(
            f'{where[:200]} is to be finite numbers, printable text, or lists and dicts'
            f' of these, not {_described(value)}'
        )

    def key(self, key: Any, where: str) -> str:
        self.characters += len(key) if type(key) is str else 0
        if type(key) is not str or len(key) > 1000 or not _is_text(key):
            raise QuantizationError(
                f'{where[:200]}: names are to be printable text, not {_described(key)}'
            )
        return key


def _is_text(text: str) -> bool:
    return text.replace('\n', ' ').isprintable()


def _described(value: Any) -> str:
    if isinstance(value, str | float):
        return repr(value)[:100]
    return f'a value of type {type(value).__name__}'
