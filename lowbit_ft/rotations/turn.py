"""Turn: x -> x R along the last axis, block by block, R orthogonal; in float64, for folding.

    R = diag(+-1) H / sqrt(D)                H of order D (lowbit_kernels.hadamard), signs drawn from a seed
    R = diag(+-1) H / sqrt(D) (I - 2 v v^T / v^T v),   v = 1 R' - 1        where means must stay: 1 R = 1

The second form is for LayerNorm, which subtracts the mean of the channels: the reflection takes the image of
the vector of ones back to it, so mean and variance of x R are those of x, norm(x R) = norm(x) R, and the
module of the model stays what it is.

Row vectors are activations, so a linear that reads x R has W R in place of W [N, K] (rows turned), one that
writes y R has R^T W (columns turned) and b R.
"""

from dataclasses import dataclass

import torch
from lowbit_kernels import hadamard
from lowbit_kernels.hadamard import factors, matrix
from torch import Tensor, nn


@dataclass(frozen=True)
class Turn:
    """A rotation of blocks of `size` channels. seed None: no signs, the plain transform that the online op
    computes; keeps_mean: the second form."""

    size: int
    seed: int | None = None
    keeps_mean: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> x R in float64; K is a multiple of `size`."""
        value = x.to(torch.float64).reshape(-1, self.size)
        value = self._plain(value)
        if self.keeps_mean:
            mirror = self._plain(torch.ones(1, self.size, dtype=torch.float64, device=x.device)) - 1
            square = float(mirror.square().sum())
            if square > 1e-12:  # the ones are where they were
                value = value - (value @ mirror.t()) @ mirror * (2 / square)
        return value.reshape(x.shape)

    def _plain(self, value: Tensor) -> Tensor:
        """[T, size] -> [T, size]: signs and transform."""
        if self.seed is not None:
            value = value * self.signs.to(value)
        m, power = factors(self.size)
        half = 1
        while half < power:  # one butterfly per factor H_2
            pair = value.view(-1, self.size // (2 * half), 2, half)
            value = torch.stack((pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]), 2)
            half *= 2
        value = value.reshape(-1, m, power)
        if m > 1:
            value = torch.einsum("ab,tbp->tap", matrix(m).to(value), value)
        return value.reshape(-1, self.size) * self.size**-0.5

    @property
    def signs(self) -> Tensor:
        """[size], +-1; the same on every machine."""
        assert self.seed is not None
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 2, (self.size,), generator=generator) * 2.0 - 1


class OnlineHadamard(nn.Module):
    """x [..., K] -> x H / sqrt(K): what cannot be folded, because a nonlinearity stands before it."""

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x, -1)
