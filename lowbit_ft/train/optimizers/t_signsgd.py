"""t-SignSGD: the entries with the largest gradients step by one within -1, 0, 1 (LoTA-QAF, arXiv 2505.18724).

    p <- clip(p - sign(g) [|g| > max(tau, sigma)], -1, 1)        sigma: the (1 - share) quantile of |g| in p
    share = the learning rate; tau = 1e-9

The share is the learning rate's place in the recipe: its peak, warm-up and curve are those of any rate
(`train.scheduler: lota` is the paper's). It keeps nothing. Left out of the released code: in the last fifth
of a run with a gradient norm above 10 it also skips the largest 0.005 %, a trick that the paper does not
name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Groups

TAU = 1e-9  # the paper's: below it a gradient says nothing


class TSignSGD(torch.optim.Optimizer):
    """lr: the share of each tensor's entries that may step, at most 1. For tensors of -1, 0 and 1."""

    def __init__(self, groups: Any, lr: float = 0.05):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                size = parameter.grad.abs()
                moves = size > max(TAU, quantile(size, 1 - group["lr"]))
                parameter.sub_(parameter.grad.sign() * moves).clamp_(-1, 1)
        return loss


def quantile(values: Tensor, q: float) -> float:
    """The largest number that is not above the q quantile: entries beyond it are those beyond the quantile,
    whatever lies between. torch.quantile sorts, and takes at most 2^24 numbers.
    """
    place = math.floor(min(max(q, 0.0), 1.0) * (values.numel() - 1))
    return float(values.flatten().kthvalue(place + 1).values)


def problem(section: Any) -> tuple[str, str] | None:
    rate = section.learning_rate
    if not isinstance(rate, str) and rate > 1:
        return (
            "learning_rate",
            f"got {rate:g}, which t_signsgd takes as the share of the entries that step; allowed: up to 1 "
            "(the paper's: 0.05)",
        )
    if section.weight_decay:
        return (
            "weight_decay",
            f"got {section.weight_decay:g} with t_signsgd, whose numbers are -1, 0 and 1; set it to 0",
        )
    return None


def t_signsgd(groups: Groups, section: Any) -> torch.optim.Optimizer:
    return TSignSGD(groups, section.learning_rate)
