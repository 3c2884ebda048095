"""A short name for two stages: AdaLog's search, and then BRECQ's reconstruction."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from ..calibration.stage import Stage
from .adalog import AdaLog
from .brecq import BRECQ


class AdaLogBRECQ:
    """What AdaLog's paper does with both of its stages.

    Args:
        options: Those of :class:`AdaLog` and those of :class:`BRECQ`.
    """

    rescales: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        names = {field.name for field in fields(BRECQ)}
        learned = {name: value for name, value in options.items() if name in names}
        searched = {name: value for name, value in options.items() if name not in names}
        self.search = AdaLog(**searched)
        self.reconstruction = BRECQ(**learned)

    @property
    def propagate_error(self) -> bool:
        """That of the search."""
        return self.search.propagate_error

    def stages(self) -> list[Stage]:
        """The search and the reconstruction."""
        return [self.search, self.reconstruction]
