"""scheduler: linear. m + (1 - m) (1 - p)"""

from __future__ import annotations

from typing import Any

from .base import Left


def linear(section: Any, progress: float, left: Left) -> float:
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * (1 - progress)
