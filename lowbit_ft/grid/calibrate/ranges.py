"""Round-to-nearest starts: absmax, minmax, and the search over clipping (mse).

Scales are searched and stored as values of grid.scale_dtype, so the error that is minimised is the error that ships.
N out features, K in features, g group size, G groups; group tensors are [G, N].
"""

from dataclasses import dataclass

import torch
from lowbit_kernels.layout import grouped, row_chunks
from torch import Tensor

from ..estimators import SMALLEST_SCALE
from ..integer import IntGrid
from ..packed import PackedWeight

# 80 clipping ratios down to a fifth of the range: at 2 bit the best ratio is often near 0.5, below 0.3 almost never.
RATIOS = torch.linspace(1.0, 0.2, 80).tolist()


@dataclass(frozen=True)
class Stats:
    """Inputs of a calibration. hessian [K, K] = sum over calibration tokens of x x^T (gptq); p: exponent of `mse`."""

    hessian: Tensor | None = None
    p: float = 2.4
    damping: float = 0.01


def round_scale(scale: Tensor, grid: IntGrid) -> Tensor:
    """fp32 values of the shipping dtype, at or above SMALLEST_SCALE (all-zero groups would have scale 0)."""
    return scale.clamp_min(SMALLEST_SCALE).to(getattr(torch, grid.scale_dtype)).float()


def full_range(groups: Tensor, grid: IntGrid) -> tuple[Tensor, Tensor | None]:
    """Scale (and zero) of [..., g] groups that cover all of the values: shapes [...]. absmax or minmax by symmetry."""
    top = grid.levels - 1
    if grid.symmetric:
        return round_scale(groups.abs().amax(-1) / (top / 2), grid), None
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = round_scale((high - low) / top, grid)
    return scale, (-low / scale).round().clamp(0, top)


def rounding_error(groups: Tensor, scale: Tensor, zero: Tensor | float, grid: IntGrid, p: float, weight: Tensor | None) -> Tensor:
    """sum |w - Q(w)|^p over a group, each input weighted by `weight` when given: [..., g] -> [...]."""
    zero = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    q = (groups / scale.unsqueeze(-1) + zero).round_().clamp_(0, grid.levels - 1).sub_(zero)
    error = (q * scale.unsqueeze(-1)).sub_(groups).abs_().pow_(p)
    return (error if weight is None else error * weight).sum(-1)


def search(groups: Tensor, grid: IntGrid, p: float, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero [...] that minimise `rounding_error` of [..., g] groups over RATIOS of the full range.

    Asymmetric: for every ratio the range shrinks about the middle, and the zero points next to that one are tried as well.
    """
    best_scale, best_zero = full_range(groups, grid)
    half = float(grid.levels // 2)
    best = rounding_error(groups, best_scale, half if best_zero is None else best_zero, grid, p, weight)
    full, low = best_scale, groups.amin(-1).clamp_max(0)
    for ratio in RATIOS:
        scale = round_scale(full * ratio, grid)
        if best_zero is None:
            candidates: list[Tensor | float] = [half]
        else:
            middle = (-low * ratio / scale).round()
            candidates = [(middle + shift).clamp(0, grid.levels - 1) for shift in (-1, 0, 1)]
        for zero in candidates:
            error = rounding_error(groups, scale, zero, grid, p, weight)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            if best_zero is not None and isinstance(zero, Tensor):
                best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _by_rows(weight: Tensor, grid: IntGrid, rule) -> PackedWeight:
    """Apply rule([n, G, g]) -> ([n, G], [n, G] | None) to chunks of rows, then round the weight onto the result."""
    scales, zeros = [], []
    for rows in row_chunks(*weight.shape):
        scale, zero = rule(grouped(weight[rows].float(), grid.group_size))
        scales.append(scale)
        zeros.append(zero)
    zero = None if grid.symmetric else torch.cat(zeros).t()
    return PackedWeight.quantize(weight, torch.cat(scales).t(), zero, grid)


def absmax(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """scale = max |w| / ((2^bits - 1) / 2), symmetric (the rule of compressed-tensors)."""
    return _by_rows(weight, grid, lambda groups: full_range(groups, grid))


def minmax(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """scale = (max - min) / (2^bits - 1) with 0 inside the range, zero = round(-min / scale)."""
    return _by_rows(weight, grid, lambda groups: full_range(groups, grid))


def mse(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """Search over clipping: the scale (and zero) with the least sum |w - Q(w)|^p per group, p = stats.p."""
    return _by_rows(weight, grid, lambda groups: search(groups, grid, stats.p))
