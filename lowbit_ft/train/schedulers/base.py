"""What a learning-rate curve is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Left:
    """Steps that are left, this one among them, and steps in all."""

    steps: int
    total: int


@dataclass(frozen=True)
class Scheduler:
    """factor(section, progress, left): the rate after the warm-up as a share of the peak; section: of train,
    progress p in [0, 1). problem(section): (key of train, what is wrong with it), None
    when nothing is.
    """

    factor: Callable[[Any, float, Left], float]
    problem: Callable[[Any], tuple[str, str] | None] = lambda section: None
