"""scale: only the group scales train, the codes stay (PEQA, arXiv 2305.14152, Eq. 2). AlphaTuning's idea on a
uniform grid.

    W^ = S * (code - zero)        S = s0 * exp(log_scale);    dS = sum dW (code - zero)

The cheapest method here: no rounding moves, no low-rank product, and a task is a set of scales.
"""

from typing import Literal

from torch import Tensor

from ..grid import GridArgs, PackedWeight, Weight
from .base import ScaledAdapter, ScaleOptions


class ScaleConfig(ScaleOptions):
    method: Literal["scale"] = "scale"
    train_scale: Literal[True] = True

    def build(self, base: Weight, weight: Tensor | None = None) -> "ScaleAdapter":
        return ScaleAdapter(self, base)


class ScaleAdapter(ScaledAdapter):
    def grid_args(self, base: PackedWeight) -> GridArgs:
        return GridArgs(scale=self.scale(base), zero=base.zero, **self.config.gradient_options())
