"""AdamW of torch, fused; beside it our own for what is held in less than fp32."""

from __future__ import annotations

from typing import Any

import torch

from .base import Groups
from .masters import MasterAdamW


def adamw(groups: Groups, section: Any) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": section.learning_rate,
        "fused": True,
        "betas": tuple(section.betas),
        "eps": section.eps,
    }
    if any("master" in group for group in groups):
        return MasterAdamW(groups, section.seed, **options)
    return torch.optim.AdamW(groups, **options)
