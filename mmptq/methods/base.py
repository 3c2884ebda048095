"""Checks of options that methods share."""

from __future__ import annotations


def require_positive(method: object, *names: str) -> None:
    """Raises ValueError if one of a method's options is not a whole number of at least
    1, naming it.
    """
    for name in names:
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f'{name} must be a whole number and at least 1, not {value!r}'
            )


def require_flags(method: object, *names: str) -> None:
    """Raises ValueError if one of a method's options is neither True nor False, naming
    it.
    """
    for name in names:
        if not isinstance(getattr(method, name), bool):
            raise ValueError(
                f'{name} must be True or False, not {getattr(method, name)!r}'
            )
