"""magnitude: the smallest weights of a matrix are zero. No text is looked at."""

from torch import Tensor

from .base import Asked, Sparsity


class Magnitude(Sparsity):
    grows = True

    def zeros(self, weight: Tensor, asked: Asked) -> Tensor:
        return asked.pattern.lowest(weight.float().abs(), asked.amount)
