"""Learning-rate curves: train.scheduler. SCHEDULERS is the list.

A curve is a function of (step, total) and nothing else, so there is no state of it to save or to get wrong
when a run is resumed. With s the 0-based step, W warm-up steps, T steps in all, m = min_lr_ratio and
p = (s - W) / (T - W):

    warm-up   (s + 1) / W                     s < W: the first step already moves (optim.py; of every curve)
    linear    m + (1 - m) (1 - p)
    cosine    m + (1 - m) (1 + cos(pi p)) / 2
    wsd       1, then over the last D = decay_ratio T steps m + (1 - m) (T - s) / D
    constant  1

To add one: a function, and its line in SCHEDULERS.
"""

from __future__ import annotations

import math
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


def linear(section: Any, progress: float, left: Left) -> float:
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * (1 - progress)


def cosine(section: Any, progress: float, left: Left) -> float:
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def wsd(section: Any, progress: float, left: Left) -> float:
    decay = max(1, round(section.decay_ratio * left.total))
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * min(1.0, left.steps / decay)


def wsd_problem(section: Any) -> tuple[str, str] | None:
    total = section.warmup_ratio + section.decay_ratio
    if total <= 1:
        return None
    return (
        "decay_ratio",
        f"got {section.decay_ratio}; with warmup_ratio the sum is {total:g}; allowed: at most 1",
    )


def constant(section: Any, progress: float, left: Left) -> float:
    return 1.0


SCHEDULERS: dict[str, Scheduler] = {
    "linear": Scheduler(linear),
    "cosine": Scheduler(cosine),
    "wsd": Scheduler(wsd, wsd_problem),
    "constant": Scheduler(constant),
}
