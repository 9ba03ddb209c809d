"""LR-QAT: a low-rank correction inside the rounding, in units of the integer grid (arXiv 2406.06385, Eq. 8).

    W^ = S * clip(round(Phi0 + alpha/r * B A))        S = s0 * exp(log_scale)

Phi0 = code + residual is the frozen base in grid units (the paper's fixed-point downcast Q_b.f with f =
residual_bits; ours is mid-rise, so step 0 is round-to-nearest without ties). D counts grid steps: a weight
moves to the next code when |D| crosses what its residual leaves. Gradients: dS = sum dW q (not LSQ's: the
grid inside the rounding is frozen), dD = S M dW. With residual_bits 0 no code moves until |D| > 1/2: then
start from `init: loftq`, or raise the learning rate.

Where a group's scale is negative (symmetric grids of few bits, grid/calibrate/ranges.py) its D counts steps
of |s0|: the signs of the scales would otherwise cut the low-rank product into pieces.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..grid import GridArgs, PackedWeight, Weight
from .base import LowRankOptions, ScaledAdapter
from .low_rank import LowRank


class LRQATConfig(LowRankOptions):
    delta_unit: ClassVar[Literal["weight", "grid"] | None] = "grid"

    method: Literal["lr_qat"] = "lr_qat"
    # Twice the rank: D counts grid steps here, and at 2 and 3 bit a learning rate of 2e-3 at gain 1 beat 1e-3
    # (LOG.md). The gain carries that factor, so one train.learning_rate suits every method.
    alpha: float = Field(32.0, gt=0, description="D = alpha / rank * B A, in grid steps")

    def build(self, base: Weight, weight: Tensor | None = None) -> "LRQAT":
        assert isinstance(base, PackedWeight)
        return LRQAT(self, base, weight)


class LRQAT(LowRank, ScaledAdapter):
    config: LRQATConfig

    def __init__(self, config: LRQATConfig, base: PackedWeight, weight: Tensor | None):
        super().__init__(config, base)
        self.start(base, weight, unit=signs(base))

    def grid_args(self, base: PackedWeight) -> GridArgs:
        a, b = self.factors()
        return GridArgs(
            scale=self.scale(base),
            zero=base.zero,
            a=a,
            b=b,
            gain=self.config.gain,
            units="grid" if (unit := signs(base)) is None else "weight",
            unit=unit,
            clip_first=self.config.clip == "clip_then_round",
            mask=self.mask,
            **self.config.gradient_options(),
        )


def signs(base: PackedWeight) -> Tensor | None:
    """Of the scales, [G, N]; None on asymmetric grids, where all are positive."""
    if not base.grid.symmetric:
        return None
    return torch.ones_like(base.scale).copysign(base.scale)
