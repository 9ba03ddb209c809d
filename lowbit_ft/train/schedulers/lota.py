"""LoTA-QAF's shares (arXiv 2505.18724): 1 to 0.02 in 80 % of the steps, then to 0.002."""

from __future__ import annotations

from typing import Any

from .base import Left

TURN, THEN, LAST = 0.8, 0.02, 0.002  # 5 % of the entries, 0.1 %, 0.01 %


def lota(section: Any, progress: float, left: Left) -> float:
    if progress < TURN:
        share = 1 + progress / TURN * (THEN - 1)
    else:
        share = THEN + (progress - TURN) / (1 - TURN) * (LAST - THEN)
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * share
