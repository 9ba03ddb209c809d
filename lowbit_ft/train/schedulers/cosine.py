"""scheduler: cosine. m + (1 - m) (1 + cos(pi p)) / 2"""

from __future__ import annotations

import math
from typing import Any

from .base import Left


def cosine(section: Any, progress: float, left: Left) -> float:
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
