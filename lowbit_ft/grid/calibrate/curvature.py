"""Curvature: what calibration text tells of a layer's inputs, H = sum x x^T, and its Cholesky factor.

Linears that are given one and the same input (q, k and v; gate and up) share one Curvature: it is summed once
and factored once, in place, whatever the number of weights.

H is symmetric, so half of it is summed: blocks of rows up to their diagonal. Before it is factored that half
is mirrored. The factor L (H + damping = L L^T, L lower) then takes the lower half, block column by block
column, in fp32, and the upper half still has H: where fp32 fails, it begins again from there in fp64. fp32
is enough because it disturbs H by about eps |H|, and damping adds 0.01 of the mean diagonal (LOG.md).

K inputs. Memory: K x K fp32 and a panel; act-order holds one more copy, the fall-back to fp64 20 bytes more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SUM_ROWS = 1024  # of H summed at a time: the half that is saved is (1 - SUM_ROWS / K) / 2
PANEL = 512  # columns of the factor made at a time
ATTEMPTS = 8  # each with ten times the damping of the one before


@dataclass(frozen=True)
class Factor:
    """lower [K, K] fp32 (what stands above its diagonal is not L's), diagonal of H [K] in the layer's own
    order, and order [K]: the input at each position of `lower` (None: as they are)."""

    lower: Tensor
    diagonal: Tensor
    order: Tensor | None


class Curvature:
    """Add inputs, then ask for the factor. hessian [K, K]: instead of summing one; it is used up."""

    def __init__(self, hessian: Tensor | None = None):
        self.total, self.tokens, self.mirrored = hessian, 1, hessian is not None
        self.made: tuple[tuple[float, bool], Factor] | None = None
        if hessian is None:
            self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x [T, K]: T more tokens."""
        x = x.float()
        k = x.shape[1]
        if self.total is None:
            self.total = torch.zeros(k, k, device=x.device)
        for start in range(0, k, SUM_ROWS):
            stop = min(start + SUM_ROWS, k)
            self.total[start:stop, :stop].addmm_(x[:, start:stop].t(), x[:, :stop])
        self.tokens += len(x)

    def hessian(self) -> Tensor:
        """H / tokens, fp32 [K, K], a copy; before `factor` uses it up."""
        assert self.total is not None, "no input was added"
        h = self.total.clone()
        if not self.mirrored:
            _mirror(h)
        return h.div_(self.tokens)

    def diagonal(self) -> Tensor:
        """Of H / tokens, fp32 [K], also after `factor`."""
        if self.made is not None:
            return self.made[1].diagonal
        assert self.total is not None, "no input was added"
        return self.total.diagonal() / self.tokens

    def factor(self, damping: float, largest_first: bool = False) -> Factor:
        """L of (H / tokens + damping * mean(diag) * I). largest_first: with the inputs in ascending order of
        diag H, for who goes from the last to the first. Asked for again it is the same one. ValueError where
        H stays singular with ten million times the damping."""
        if self.made is None:
            self.made = ((damping, largest_first), self._factored(damping, largest_first))
        assert self.made[0] == (damping, largest_first), "a Curvature is factored once: H is used up"
        return self.made[1]

    def _factored(self, damping: float, largest_first: bool) -> Factor:
        h, self.total = self.total, None
        assert h is not None, "no input was added"
        if not self.mirrored:
            _mirror(h)
        h.div_(self.tokens)
        diagonal = h.diagonal().clone()
        # Inputs that were never active: their weights are rounded alone. Their diagonal is the mean of the
        # others, not 1: damping is relative to the mean diagonal, and activations may be small.
        dead = diagonal == 0
        alive = diagonal.clone()
        alive[dead] = diagonal[~dead].mean() if (~dead).any() else 1.0
        order = alive.argsort(stable=True) if largest_first else None
        if order is not None:
            h, alive = h[order][:, order], alive[order]
        added = alive.mean().clamp_min(1e-12) * damping
        h.diagonal().copy_(alive + added)
        if not factor_(h):
            _in_double(h, alive, added)
        return Factor(h, diagonal, order)


def factor_(h: Tensor) -> bool:
    """The lower triangle of h [K, K] becomes that of L, h = L L^T; what is above the diagonal stays. False:
    h is not positive definite in this precision, and its lower triangle is spoiled.
    """
    k = len(h)
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        before, corner = h[start:stop, :start], h[start:stop, start:stop]
        top, info = torch.linalg.cholesky_ex(torch.addmm(corner, before, before.t(), alpha=-1))
        if info.item():
            return False
        corner.copy_(top + corner.triu(1))
        if stop < k:
            below = torch.addmm(h[stop:, start:stop], h[stop:, :start], before.t(), alpha=-1)
            h[stop:, start:stop] = torch.linalg.solve_triangular(top.t(), below, upper=True, left=False)
    return True


def _mirror(h: Tensor) -> None:
    """The blocks below the diagonal ones are copied to where they belong above."""
    for start in range(SUM_ROWS, len(h), SUM_ROWS):
        stop = min(start + SUM_ROWS, len(h))
        h[:start, start:stop] = h[start:stop, :start].t()


def _in_double(h: Tensor, diagonal: Tensor, added: Tensor) -> None:
    """`factor_` from the upper triangle of h, in fp64, with more and more damping. h gets the factor."""
    for attempt in range(ATTEMPTS):
        double = h.double().triu_(1)
        double += double.t().clone()
        double.diagonal().copy_(diagonal.double() + added.double() * 10**attempt)
        if factor_(double):
            h.copy_(double)
            return
    raise ValueError(
        f"gptq: the Hessian stays singular with {added.item() * 10 ** (ATTEMPTS - 1):g} added to its "
        "diagonal; give more calibration text (quant.calibration), or set quant.calibrate: mse"
    )
