"""The stages of a recipe: ``method`` is short for one of them, or for a usual pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import QuantizationError
from ..methods import BRECQ

PAIR = ('AdaLog', 'BRECQ')
"""The stages that the method ``AdaLogBRECQ`` is short for."""


def canonical(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe in the shorter of its two forms, so that equal recipes are equal dicts.

    One stage, and AdaLog followed by BRECQ, become ``method``, with ``propagate_error``
    as an option of it; what has no short name keeps ``stages`` and ``propagate_error``.

    Raises:
        QuantizationError: If there are both forms, or one is not of its type.
    """
    result = dict(recipe)
    if 'stages' in result and 'method' in result:
        raise QuantizationError(
            'recipe: it has a method and stages: give one of the two'
        )
    propagate = result.get('propagate_error')
    if propagate is not None and not isinstance(propagate, bool):
        raise QuantizationError(
            f'recipe: propagate_error must be True or False, not {propagate!r}'
        )
    if 'stages' in result:
        stages = checked_stages(result['stages'])
        short = short_form(stages)
        if short is None:
            return {**result, 'stages': stages}
        del result['stages']
        result['method'] = short
    result.pop('propagate_error', None)
    if propagate is not None and isinstance(result.get('method'), Mapping):
        result['method'] = {**result['method'], 'propagate_error': propagate}
    return result


def checked_stages(stages: Any) -> list[dict[str, Any]]:
    """Plain copies of the stages.

    Raises:
        QuantizationError: If they are not a list of dicts, at least one, or a stage has
            an option that is the recipe's.
    """
    if not isinstance(stages, list | tuple) or not stages:
        raise QuantizationError(
            f'recipe: stages is to be a list of dicts, one a stage, not {stages!r}'
        )
    for number, stage in enumerate(stages, 1):
        if not isinstance(stage, Mapping) or not all(
            isinstance(key, str) for key in stage
        ):
            raise QuantizationError(
                f'recipe: stage {number} is to be a dict with text as keys, not'
                f' {stage!r}'
            )
        if 'propagate_error' in stage:
            raise QuantizationError(
                'recipe: propagate_error is a key of the recipe, beside stages, '
                f'not of stage {number}'
            )
    return [dict(stage) for stage in stages]


def short_form(stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The method that is short for some stages, if there is one."""
    if len(stages) == 1:
        return stages[0]
    if tuple(stage.get('type') for stage in stages) != PAIR:
        return None
    search, reconstruction = stages
    own = {field.name for field in fields(BRECQ)}
    if own & search.keys() or reconstruction.keys() - own != {'type'}:
        return None  # an option in the wrong stage, whose error is to name the stage
    return {**search, **reconstruction, 'type': ''.join(PAIR)}
