"""kind: backprop. The straight-through gradient: forward and backward of every micro-batch, added up."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .base import Gradient, Making, Window, zeros
from .config import GradientConfig


class BackpropConfig(GradientConfig):
    kind: Literal["backprop"] = "backprop"

    def build(self, making: Making) -> Gradient:
        return Backprop()


class Backprop(Gradient):
    def fill(self, window: Window) -> Tensor:
        # In fp64, so that it does not matter how the micro-batches are spread over processes.
        sums = zeros(window)
        for i in range(window.size):
            with window.alone(i):
                parts = window.loss(i)
                window.backward((parts * window.factors.to(parts.dtype)).sum())
                sums += parts.detach()
        return sums
