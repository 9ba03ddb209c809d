"""none: no weight is locked, and there is no mask. The default."""

import torch
from torch import Tensor

from .base import Asked, Sparsity


class Dense(Sparsity):
    locks = False
    prunes = False

    def zeros(self, weight: Tensor, asked: Asked) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.bool)
