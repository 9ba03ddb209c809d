"""GPTQ: round column after column, and let the columns not yet rounded make up for each rounding error (arXiv
2210.17323).

With H = X^T X over calibration tokens, damped, and its factor H = L L^T (curvature.py), columns are taken
from the last to the first, and when column i comes up

    w_i' = w_i + 1 / L_ii * sum over j > i of L_ji (w_j - q_j);        q_i = Q(w_i')

which is the textbook recursion on the inverse (w_j -= (w_i - q_i) U_ij / U_ii, U^T U = H^-1) solved for w_i':
no inverse is formed, and a column is written once. Sums over what lies outside a block of columns are one
product per block, inside it one per SUB columns, then one product of a vector per column; rows of the weight
are taken ROWS at a time, so that what a block works on stays in the cache. The order of columns is free: from
the last to the first is the one in which H needs no second copy.

A group's scale and zero are searched on the weights as they are when its first column comes up,
w' = w + L_gg^-T (sum over j after the group), with inputs weighted by diag H. `static_groups` searches them
on the original weights instead. `act_order` takes columns by falling diag H; then groups, which stay
contiguous so that every format can hold the result, are static. The base's residual is taken from w', which
is within the clip of its code, so training starts where GPTQ ended.

Weights that are locked at zero (`Stats.zeros`) are given as they came: q = 0 there, and what they were is
made up for like a rounding error.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..integer import IntGrid
from ..packed import PackedWeight, stack_rows
from .curvature import Factor
from .ranges import COARSE_RATIOS, Stats, search

ROWS, BLOCK, SUB = 2048, 128, 32  # rows at a time; columns per product: outside a block, inside one


def gptq(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """weight [N, K], stats.curvature of K inputs. ValueError without one."""
    if stats.curvature is None:
        raise ValueError("gptq needs calibration text: set quant.calibration.path, or calibrate: mse")
    factor = stats.curvature.factor(stats.damping, stats.act_order)
    static = stats.static_groups or stats.act_order or grid.group_size == -1
    zeros = [None] * -(-len(weight) // ROWS) if stats.zeros is None else stats.zeros.split(ROWS)
    parts = [
        _Rows(part, grid, factor, static, locked).rounded()
        for part, locked in zip(weight.split(ROWS), zeros, strict=True)
    ]
    packed = stack_rows(parts)
    assert isinstance(packed, PackedWeight)
    return packed


@dataclass
class _Rows:
    """Some rows of a weight [n, K] on their way; tensors of columns are [K, n]: a column is contiguous."""

    weight: Tensor
    grid: IntGrid
    factor: Factor
    static: bool
    zeros: Tensor | None  # bool [n, K]

    def rounded(self) -> PackedWeight:
        n, k = self.weight.shape
        self.group = k if self.grid.group_size == -1 else self.grid.group_size
        mean = self.factor.diagonal.mean()
        self.importance = self.factor.diagonal.clamp_min(mean * 1e-4 + 1e-12)
        groups = -(-k // self.group)
        self.scale = torch.empty(groups, n, device=self.weight.device)
        self.zero = torch.full_like(self.scale, float(self.grid.levels // 2))
        columns = self.weight.t()
        self.w = (columns if self.factor.order is None else columns[self.factor.order]).float().contiguous()
        if self.w.data_ptr() == self.weight.data_ptr():
            self.w = self.w.clone()  # one column: its transpose is itself
        self.locked = None
        if self.zeros is not None:
            bits = self.zeros.t()
            self.locked = (bits if self.factor.order is None else bits[self.factor.order]).contiguous()
        if self.static:
            for g in range(groups):
                self._search(g, self.weight[:, g * self.group : (g + 1) * self.group].float())
        self.moved = torch.empty_like(self.w)  # w - q of the columns that are done
        owner = torch.arange(k, device=self.w.device) // self.group
        self.owner = (owner if self.factor.order is None else owner[self.factor.order]).tolist()
        self.pivots = self.factor.lower.diagonal().tolist()
        for block in from_the_end(0, k, BLOCK if self.static else max(BLOCK, self.group)):
            self._block(block, k)
        found = self.w if self.factor.order is None else self.w[self.factor.order.argsort()]
        zero = None if self.grid.symmetric else self.zero
        return PackedWeight.quantize(found.t().contiguous(), self.scale, zero, self.grid)

    def _owed(self, columns: slice, first: int, last: int) -> Tensor:
        """sum over j in first..last of L_ji (w_j - q_j), for the columns i of a slice: [columns, n]."""
        return self.factor.lower[first:last, columns].t() @ self.moved[first:last]

    def _block(self, block: slice, k: int) -> None:
        owed = self._owed(block, block.stop, k)
        for span in from_the_end(block.start, block.stop, len(owed) if self.static else self.group):
            mine = owed[span.start - block.start : span.stop - block.start]
            mine += self._owed(span, span.stop, block.stop)
            if not self.static:
                corner = self.factor.lower[span, span].t()
                change = torch.linalg.solve_triangular(corner, mine, upper=True)
                self._search(span.start // self.group, change.add_(self.w[span]).t().contiguous())
            for sub in from_the_end(span.start, span.stop, SUB):
                now = mine[sub.start - span.start : sub.stop - span.start]
                self._columns(sub, now + self._owed(sub, sub.stop, span.stop))

    def _columns(self, sub: slice, owed: Tensor) -> None:
        """Round the columns of a slice, from the last to the first."""
        top, lower = self.grid.levels - 1, self.factor.lower
        for i in range(sub.stop - 1, sub.start - 1, -1):
            scale, zero, w = self.scale[self.owner[i]], self.zero[self.owner[i]], self.w[i]
            due = torch.addmv(
                owed[i - sub.start], self.moved[i + 1 : sub.stop].t(), lower[i + 1 : sub.stop, i]
            )
            now = torch.add(w, due, alpha=1 / self.pivots[i])
            q = torch.div(now, scale).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale)
            if self.locked is not None:
                q.masked_fill_(self.locked[i], 0)
                now.masked_fill_(self.locked[i], 0)
            torch.sub(w, q, out=self.moved[i])
            w.copy_(now)  # what it was when its turn came: the residual is taken from it

    def _search(self, g: int, weight: Tensor) -> None:
        """Scale and zero of group g from [n, inputs of the group]."""
        start = g * self.group
        importance = self.importance[start : start + weight.shape[1]]
        if self.zeros is not None:  # the scale is of those that are left: a zero costs nothing at any
            weight = weight.masked_fill(self.zeros[:, start : start + weight.shape[1]], 0)
        scale, zero = search(weight.contiguous(), self.grid, 2.0, importance, COARSE_RATIOS)
        self.scale[g] = scale
        if zero is not None:
            self.zero[g] = zero


def from_the_end(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of `size` that begin at start, start + size, ..., the last one first."""
    for first in reversed(range(start, stop, size)):
        yield slice(first, min(first + size, stop))
