"""LowRank: A [r, K] and B [N, r] of one layer, D = alpha / r * B A; of a fused matrix a pair for each part.

In a matrix that is q, k and v in one, one product of rank r is shared by rows that have nothing to do with
each other. With `segments: auto` each of its S parts has a product of its own:

    D[n] = alpha / r * B[n] A_s        s the part that row n is in (rows may alternate, as in GPT-NeoX)

A is the A_s one below the other [S r, K]; B stays [N, r], row n belonging to the A of its part. The op is
given the same thing as one product of rank S r, in which B has zeros where a row has no share: exact, so the
merge is what it was, and the low-rank product costs S times as much (2 S r N K beside the 2 T N K of T
tokens).
"""

from __future__ import annotations

import math

import torch
from lowbit_kernels.pack import decode_residual
from torch import Tensor, nn

from ..grid import PackedWeight, Weight
from ..segments import check_parts
from . import latent
from .base import LowRankOptions
from .pruned import Pruned


class LowRank(Pruned):
    """An adapter with such a product. `config.parts` are those of its layer."""

    config: LowRankOptions
    owner: Tensor | None  # int64 [N], the part that a row is in; None: there is one

    def start(self, base: PackedWeight, weight: Tensor | None, unit: Tensor | None) -> None:
        """Make A and B by the start the config names. unit [G, N] turns grid steps into the unit of D (None:
        D counts grid steps). ValueError where the parts are not those of such a layer."""
        (n, k), device, parts = base.shape, base.codes.device, self.config.parts
        if parts:
            check_parts(parts, n, f"{n} x {k}")
            owner = torch.empty(n, dtype=torch.int64, device="cpu")
            for number, part in enumerate(parts):
                owner[part.channels()] = number
            self.register_buffer("owner", owner.to(device), persistent=False)
        else:
            self.owner = None
        # Drawn on the CPU: the same start wherever the layer lies (train/sharding.py cuts models that lie on
        # the CPU).
        a = torch.empty(max(1, len(parts)) * self.config.rank, k, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        a = a.to(device)
        b = torch.zeros(n, self.config.rank, dtype=torch.float32, device=device)
        if self.config.init != "zero":
            error = rounding_error(base, weight)
            if unit is not None:
                error = error * expand(unit, k, base.grid.group_size)
            for first, rows in self.pieces():
                self._from_error(error[rows], a[first : first + self.config.rank], b, rows)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def pieces(self) -> list[tuple[int, Tensor | slice]]:
        """(first row of its A, rows of B) of every part."""
        if self.owner is None:
            return [(0, slice(None))]
        parts = range(len(self.config.parts))
        return [(i * self.config.rank, torch.nonzero(self.owner == i)[:, 0]) for i in parts]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [N, R] of the product as the op takes it, R the ranks of all parts."""
        if self.owner is None:
            return self.A, self.B
        (n, rank), count = self.B.shape, len(self.config.parts)
        place = self.owner[:, None, None].expand(n, 1, rank)
        apart = torch.zeros(n, count, rank, dtype=self.B.dtype, device=self.B.device)
        return self.A, apart.scatter(1, place, self.B[:, None]).flatten(1)

    def own(self, product: Tensor) -> Tensor:
        """`factors` turned round, for what is of the shape of its B [N, R]: what belongs to this B [N, r]."""
        if self.owner is None:
            return product
        (n, rank), count = self.B.shape, len(self.config.parts)
        place = self.owner[:, None, None].expand(n, 1, rank)
        return product.view(n, count, rank).gather(1, place)[:, 0]

    def one_step(self, base: Weight) -> dict[str, Tensor | float]:
        found = super().one_step(base)
        if self.owner is not None and "B" in found:
            # A row of B meets the A of its part alone.
            count = len(self.config.parts)
            squares = self.A.view(count, -1).square().sum(1)
            met = squares[self.owner].mean().clamp_min(torch.finfo(torch.float32).tiny)
            found["B"] = found["B"] * (squares.sum() / met).sqrt()
        return found

    def pull(self, base: PackedWeight, skip_clipped: bool) -> dict[str, Tensor]:
        found = super().pull(base, skip_clipped)
        return {name: self.own(value) if name == "B" else value for name, value in found.items()}

    def drawn(self, base: PackedWeight, share: float, skip_clipped: bool) -> dict[str, Tensor]:
        parts = max(1, len(self.config.parts))
        found = latent.drawn(base, self.grid_args(base), share, skip_clipped, parts)
        return {name: self.own(value) for name, value in found.items()}

    def _from_error(self, error: Tensor, a: Tensor, b: Tensor, rows: Tensor | slice) -> None:
        """svd or loftq: the top of an error [rows, K] into a [r, K] and these rows of b."""
        q = min(self.config.rank, *error.shape)
        if 4 * (q + 8) < min(error.shape):
            # Randomized (Halko et al., arXiv 0909.4061): only the top of a long spectrum is wanted, at a
            # fraction of the time (1024 x 4096, rank 16, two cores: 0.1 s against 2.5 s).
            u, s, v = torch.svd_lowrank(error, q=q + 8, niter=4)
        else:
            u, s, vh = torch.linalg.svd(error, full_matrices=False)
            v = vh.t()
        a[:q] = v.t()[:q]
        if self.config.init == "loftq":
            a[:q] *= s[:q, None].sqrt()
            a[q:] = 0
            own = torch.zeros_like(b[rows])
            own[:, :q] = u[:, :q] * s[:q].sqrt() / self.config.gain
            b[rows] = own


def expand(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """[G, N] -> fp32 [N, K]."""
    size = in_features if group_size == -1 else group_size
    return values.t().float().repeat_interleave(size, dim=1)[:, :in_features]


def rounding_error(base: PackedWeight, weight: Tensor | None) -> Tensor:
    """What rounding threw away, in grid steps, fp32 [N, K]: from the residual, or from the dense weight when
    there is none.
    """
    k, f = base.shape[1], base.grid.residual_bits
    if base.residual is not None:
        error = decode_residual(base.residual, f, k)
    else:
        assert weight is not None, "config.wants_weight was ignored"
        scale = expand(base.scale, k, base.grid.group_size)
        error = ((weight.to(scale.device).float() - base.dequantize()) / scale).clamp_(-0.5, 0.5)
    return error if (zeros := base.locked) is None else error.masked_fill_(zeros, 0)
