"""Several recipes on one model, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.writing import write_text_atomically
from .quantize import quantize


def compare(
    config: str,
    checkpoint: str,
    recipes: Sequence[str],
    work_dir: Path,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Quantizes a model with one recipe after another, evaluates the float one once,
    and writes all results to ``results.json``.

    Args:
        config: As for :func:`quantize`.
        checkpoint: As for :func:`quantize`.
        recipes: Names of recipes.
        work_dir: Has a work_dir for each recipe.
        settings: Further arguments of :func:`quantize`.

    Returns:
        The summaries.
    """
    summaries: list[dict[str, Any]] = []
    for recipe in recipes:
        summaries.append(
            quantize(
                config,
                checkpoint,
                recipe,
                work_dir=str(work_dir / recipe),
                float_eval=not summaries,
                **settings,
            )
        )
        text = json.dumps(summaries, indent=2) + '\n'
        write_text_atomically(text, work_dir / 'results.json')
    return summaries
