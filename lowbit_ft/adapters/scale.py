"""scale: only the group scales train, the codes stay (PEQA, arXiv 2305.14152, Eq. 2). AlphaTuning's idea on a
uniform grid.

    W^ = S * (code - zero)        S = s0 * exp(log_scale);    dS = sum dW (code - zero)

The cheapest method here: no rounding moves, no low-rank product, and a task is a set of scales.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..grid import GridArgs, PackedWeight, Weight
from .base import Adapter, ScaledAdapter, ScaleOptions


class ScaleConfig(ScaleOptions):
    method: Literal["scale"] = "scale"
    train_scale: Literal[True] = True

    def build(self, base: Weight, weight: Tensor | None = None) -> "ScaleAdapter":
        return ScaleAdapter(self, base)


class ScaleAdapter(ScaledAdapter):
    def grid_args(self, base: PackedWeight) -> GridArgs:
        return GridArgs(scale=self.scale(base), zero=base.zero, **self.config.gradient_options())

    def sum_of(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
        return sum_of_factors("log_scale", adapters, weights)


def sum_of_factors(key: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The logarithm of 1 + sum_i w_i (exp(l_i) - 1), l_i the trained logarithms `key` of the scales.
    ValueError where that is not positive: scales keep their sign."""
    logs = [adapter.get_parameter(key).detach().double() for adapter in adapters]
    change = torch.stack([w * torch.expm1(log) for w, log in zip(weights, logs, strict=True)]).sum(0)
    if lost := int((change <= -1).sum()):
        raise ValueError(
            f"with these weights {lost} of {change.numel()} scales would be 0 or change their sign, which a "
            "trained scale cannot; use smaller weights"
        )
    return {key: torch.log1p(change).float()}
