"""Warm-up, stable, decay: 1, then over the last D = decay_ratio T steps m + (1 - m) (T - s) / D"""

from __future__ import annotations

from typing import Any

from .base import Left


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
