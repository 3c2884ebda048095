"""What a recipe says of single layers: patterns on their names, and what is different
there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache
from typing import Any

from ..errors import QuantizationError, printable
from .spec import SITES

PREFIX = 'backbone.'
"""What names below the backbone begin with in the whole model; a pattern may leave it
out.
"""

KINDS = ('weight', 'activation', 'softmax')
"""What numbers of bits are given for."""

# A recipe may come from a file: to match all patterns with all layers must take no
# time.
MOST_ENTRIES, LONGEST, MOST_STARS = 512, 200, 8


@dataclass(frozen=True)
class LayerEntry:
    """What differs at the layers and attention products whose names match a pattern.

    Attributes:
        pattern: A shell pattern for the whole name in the model: ``*`` stands for any
            text, dots included, ``?`` for one character, ``[...]`` for one of some.
            Names below the backbone may be matched without their ``backbone.``.
        bits: By kind (``weight``, ``activation``, ``softmax``), whatever a site has of
            its own.
        quantizers: By site, options that replace single ones of the recipe's quantizer;
            all of them where they name another type.
        keep_float: Whether the layer stays float; None leaves that to other entries.
    """

    pattern: str
    bits: dict[str, int] = field(default_factory=dict)
    quantizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    keep_float: bool | None = None

    @classmethod
    def from_dict(cls, pattern: Any, entry: Any) -> LayerEntry:
        """Checks an entry, but not whether its quantizers can be built.

        Raises:
            QuantizationError: If the pattern or a key, number of bits or site is none,
                naming it.
        """
        _check_pattern(pattern)
        _require(
            _is_options(entry),
            pattern,
            f'is to be a dict with text as keys, not {entry!r}',
        )
        unknown = sorted(set(entry) - {'bits', 'quantizers', 'float'})
        _require(not unknown, pattern, f'has bits, quantizers or float, not {unknown}')
        _require(
            len(entry) > 0, pattern, 'says nothing: give bits, quantizers or float=True'
        )
        bits, quantizers = entry.get('bits', {}), entry.get('quantizers', {})
        keep_float = entry.get('float')
        _require(
            'float' not in entry or isinstance(keep_float, bool),
            pattern,
            f'float is True or False, not {keep_float!r}',
        )
        _require(
            not keep_float or len(entry) == 1,
            pattern,
            'float=True leaves nothing for bits or quantizers to say',
        )
        _check_bits(pattern, bits)
        _check_quantizers(pattern, quantizers)
        bits = dict(bits)
        if 'activation' in bits:  # as for the whole recipe
            bits.setdefault('softmax', bits['activation'])
        options = {site: dict(quantizer) for site, quantizer in quantizers.items()}
        return cls(pattern, bits, options, keep_float)

    def to_dict(self) -> dict[str, Any]:
        """The entry as an element of a recipe's list."""
        entry: dict[str, Any] = {'pattern': self.pattern}
        if self.bits:
            entry['bits'] = dict(self.bits)
        if self.quantizers:
            entry['quantizers'] = {
                site: dict(quantizer) for site, quantizer in self.quantizers.items()
            }
        if self.keep_float is not None:
            entry['float'] = self.keep_float
        return entry

    def matches(self, name: str) -> bool:
        """Whether a layer, by its name in the whole model, is meant."""
        expression = _compiled(self.pattern)
        if expression.match(name):
            return True
        return name.startswith(PREFIX) and bool(expression.match(name, len(PREFIX)))


def read_entries(layers: Any) -> tuple[LayerEntry, ...]:
    """The entries of a recipe, in their order.

    Args:
        layers: A dict of entries by pattern, or a list of entries that have their
            ``pattern`` as a key. Files have a list, since configs and JSON are written
            with the keys of a dict sorted.

    Raises:
        QuantizationError: If it is neither, or an entry is wrong, or there are more
            than 512.
    """
    if isinstance(layers, Mapping):
        pairs = list(layers.items())
    elif isinstance(layers, list | tuple) and all(map(_has_pattern, layers)):
        pairs = [(entry['pattern'], _without_pattern(entry)) for entry in layers]
    else:
        raise QuantizationError(
            'recipe: layers is to be a dict of entries by pattern, or a list of'
            f' entries with their pattern, not {layers!r}'
        )
    if len(pairs) > MOST_ENTRIES:
        raise QuantizationError(
            f'recipe: layers has {len(pairs)} entries, {MOST_ENTRIES} are the most; say'
            ' it with fewer patterns'
        )
    return tuple(LayerEntry.from_dict(pattern, entry) for pattern, entry in pairs)


def require_matches(
    entries: Iterable[LayerEntry], names: list[str], model: str
) -> None:
    """Raises QuantizationError if an entry matches none of a model's layers, with names
    that are near.
    """
    for entry in entries:
        if any(map(entry.matches, names)):
            continue
        whole = entry.pattern.startswith(PREFIX)
        known = (
            names if whole else [*names, *(name.removeprefix(PREFIX) for name in names)]
        )
        near = get_close_matches(entry.pattern, known, 3, 0.4) or names[:3]
        raise QuantizationError(
            f'recipe: layers: {entry.pattern!r} matches no layer or product of {model}'
            f' that is in scope; near are {", ".join(near)} (a pattern is for whole'
            ' names, * for any text in them)'
        )


@lru_cache(maxsize=2 * MOST_ENTRIES)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise QuantizationError(
            f'recipe: layers: a pattern is to be text, not {pattern!r}'
        )
    if len(pattern) > LONGEST or printable(pattern) != pattern:
        raise QuantizationError(
            f'recipe: layers: a pattern is one printable line of at most {LONGEST}'
            f' characters, not {pattern[:50]!r}...'
        )
    _require(
        pattern.count('*') <= MOST_STARS, pattern, f'has more than {MOST_STARS} stars'
    )


def _check_bits(pattern: str, bits: Any) -> None:
    fits = _is_options(bits) and set(bits) <= set(KINDS)
    _require(
        fits, pattern, f'bits is a dict with some of {", ".join(KINDS)}, not {bits!r}'
    )
    for kind, number in bits.items():
        fits = type(number) is int and 2 <= number <= 8
        _require(
            fits,
            pattern,
            f'bits of {kind} must be an integer from 2 to 8, not {number!r}',
        )


def _check_quantizers(pattern: str, quantizers: Any) -> None:
    _require(
        _is_options(quantizers),
        pattern,
        f'quantizers is a dict by site, not {quantizers!r}',
    )
    for site, options in quantizers.items():
        _require(
            site in SITES, pattern, f'the site {site} is none of {", ".join(SITES)}'
        )
        _require(
            _is_options(options), pattern, f'{site} is to be a dict, not {options!r}'
        )


def _is_options(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _has_pattern(entry: Any) -> bool:
    return isinstance(entry, Mapping) and 'pattern' in entry


def _without_pattern(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != 'pattern'}


def _require(condition: bool, pattern: str, otherwise: str) -> None:
    if not condition:
        raise QuantizationError(f'recipe: layers: {pattern!r}: {otherwise}')
