"""AdamW of torch, fused."""

from __future__ import annotations

from typing import Any

import torch

from .base import Groups


def adamw(groups: Groups, section: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, fused=True, betas=tuple(section.betas), eps=section.eps
    )
