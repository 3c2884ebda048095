"""How who works on quantizers finds what to do with one: a table by class, not a chain
of conditions.

Each consumer (codes at run time, packing, ONNX) has a table of its own, so that a
quantizer of a user's is added to each by one line, and a table that lacks it can be
named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar('Entry')


def entry_for(table: Mapping[type, Entry], item: object) -> Entry | None:
    """The entry of an object's class, or of the nearest class that it inherits from;
    None without one.
    """
    entries = (table[kind] for kind in type(item).__mro__ if kind in table)
    return next(entries, None)


def entry_for_pair(
    table: Mapping[tuple[type, type], Entry], left: object, right: object
) -> Entry | None:
    """The entry of two objects' classes, or of those nearest that they inherit from.

    The left class counts first. None without one.
    """
    kinds = (
        (first, second)
        for first in type(left).__mro__
        for second in type(right).__mro__
    )
    entries = (table[pair] for pair in kinds if pair in table)
    return next(entries, None)
