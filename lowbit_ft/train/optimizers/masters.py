"""AdamW for a D that is held in less than fp32 (adapters/dense.py: adapter.master), beside torch's own for
all else.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        den = sqrt(v / (1 - b2^t)) + eps
    w  = (1 - lr wd) D - lr m / ((1 - b1^t) den)                  in fp32, a few rows at a time

    bf16    D <- w rounded to one of its two neighbours, the nearer the likelier: right on average, where
            rounding to the nearest loses every step below half of what bf16 tells apart
    none    D <- round(w),   m <- m + (1 - b1^t) / lr (1 - 1 / b1) den (w - D)        (ECO, arXiv 2601.22101)

The last puts the remainder back: what is added to m moves D by -lr (b1 + b1^2 + ...) of it over the steps
that follow, which is w - D in all where rate and den stay. While nothing crosses half a step, m grows to
m / b1 by every one, as a sum of gradients does: m is the latent weight.

Averages are fp32. What is drawn comes from a generator of the run's seed, the step and the tensor's place: a
resumed run draws alike, and so does every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...gradients.directions import seeded
from .base import Groups

SLICE = 1 << 18  # weights at a time
AT_WORK = 18  # bytes of each: its fp32 gradient or the bits that are drawn, den, w, and what is written


class MasterAdamW(torch.optim.AdamW):
    """Groups with "master" are stepped here, the others by torch. seed: of the run."""

    def __init__(self, groups: Groups, seed: int, **options: Any) -> None:
        self.seed = seed
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"] if "master" in group else ()):
                if parameter.grad is not None:
                    self.one(parameter, group, f"{group['name']}/{place}")
                    hidden[parameter], parameter.grad = parameter.grad, None
        try:
            super().step(closure)
        finally:
            for parameter, grad in hidden.items():
                parameter.grad = grad

    def one(self, parameter: Tensor, group: dict[str, Any], name: str) -> None:
        """The step of one tensor [R, K]."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] = state["step"].cpu() + 1  # there but for the first step behind a resume on a GPU
        (b1, b2), rate, t = group["betas"], group["lr"], int(state["step"])
        first, second = 1 - b1**t, 1 - b2**t
        draw = torch.Generator(parameter.device).manual_seed(seeded(self.seed, t, 0, name))
        assert parameter.grad is not None
        size = max(1, SLICE // parameter.shape[1])
        for rows in (slice(i, i + size) for i in range(0, parameter.shape[0], size)):
            g, m, v = parameter.grad[rows].float(), state["exp_avg"][rows], state["exp_avg_sq"][rows]
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            del g
            den = (v / second).sqrt_().add_(group["eps"])
            wanted = parameter[rows].float().mul_(1 - rate * group["weight_decay"])
            wanted.addcdiv_(m, den, value=-rate / first)
            if group["master"] == "bf16":
                parameter[rows] = at_random(wanted, draw)
            elif rate:  # else nothing has moved, and there is no rate to put anything back by
                whole = wanted.round()
                m.add_(wanted.sub_(whole).mul_(den), alpha=first / rate * (1 - 1 / b1))
                parameter[rows] = whole.bfloat16()


def at_random(x: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 -> bf16, to one of the two neighbours, so that the mean is x: 16 random bits are added to those
    that bf16 has not, which are then cut off. Infinity, and the NaN that computing makes, stay. x is lost."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=draw, device=x.device, dtype=torch.int32)
    x.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    return x.bfloat16()
