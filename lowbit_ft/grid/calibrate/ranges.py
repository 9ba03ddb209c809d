"""Round-to-nearest starts: absmax, minmax, and the search over clipping (mse).

Scales are searched and stored as values of grid.scale_dtype, so the error that is minimised is the error that
ships. N out features, K in features, g group size, G groups; group tensors are [G, N].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lowbit_kernels.layout import grouped, row_chunks
from torch import Tensor

from ..estimators import away_from_zero
from ..integer import IntGrid
from ..packed import PackedWeight
from .curvature import Curvature

# 80 clipping ratios down to a fifth of the range: at 2 bit the best ratio is often near 0.5, below 0.3 almost
# never.
RATIOS = torch.linspace(1.0, 0.2, 80).tolist()
COARSE_RATIOS = RATIOS[::3]  # steps of 0.03, for gptq: a bf16 scale is rounded by up to 0.004 (LOG.md)
PRUNE_EVERY = 6  # of RATIOS between two looks at which groups are done
SIGNED_BITS = 4  # symmetric grids of so many bits and fewer have scales of either sign
CPU_ELEMENTS = 1 << 17  # weights searched at a time by a CPU thread: 0.5 MB in fp32


@dataclass(frozen=True)
class Stats:
    """Inputs of a calibration. curvature: of the layer's inputs, from calibration text (gptq); p: exponent
    of `mse`; steps, seed: of signround; zeros: bool [N, K], the weights that are locked at zero (sparsity/),
    for those that are given them (Calibrator.makes_up); the rest: see gptq.py.
    """

    curvature: Curvature | None = None
    p: float = 2.4
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    steps: int = 200
    seed: int = 0
    zeros: Tensor | None = None


def round_scale(scale: Tensor, grid: IntGrid) -> Tensor:
    """fp32 values of the shipping dtype, SMALLEST_SCALE away from 0 (all-zero groups would have scale 0)."""
    return away_from_zero(scale).to(getattr(torch, grid.scale_dtype)).float()


def full_range(groups: Tensor, grid: IntGrid) -> tuple[Tensor, Tensor | None]:
    """Scale (and zero) of [..., g] groups that cover all of the values: shapes [...]. absmax or minmax by
    symmetry.
    """
    top = grid.levels - 1
    if grid.symmetric:
        return round_scale(groups.abs().amax(-1) / (top / 2), grid), None
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = round_scale((high - low) / top, grid)
    return scale, (-low / scale).round().clamp(0, top)


def rounding_error(
    groups: Tensor, scale: Tensor, zero: Tensor | float, grid: IntGrid, p: float, weight: Tensor | None
) -> Tensor:
    """sum |w - Q(w)|^p over a group, each input weighted by `weight` when given: [..., g] -> [...]."""
    zero = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    q = (groups / scale.unsqueeze(-1) + zero).round_().clamp_(0, grid.levels - 1).sub_(zero)
    error = (q * scale.unsqueeze(-1)).sub_(groups).abs_().pow_(p)
    return (error if weight is None else error * weight).sum(-1)


def search(
    groups: Tensor,
    grid: IntGrid,
    p: float,
    weight: Tensor | None = None,
    ratios: Sequence[float] = RATIOS,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero [...] that minimise `rounding_error` of [..., g] groups over ratios of the full range.

    Asymmetric: for every ratio the range shrinks about the middle, and the zero points next to that one are
    tried as well.

    Symmetric, at most SIGNED_BITS: a code goes one step further down than up (-2..1 at two bits), so a group
    is searched as it is and with its signs changed, and where that is better its scale is negative. It costs
    no bit, and every consumer multiplies by it as by any other.

    A group is left alone once what clipping alone costs it is no less than its best error: a smaller ratio
    clips more, so it cannot be better. The result is that of the whole search; 4-bit groups of ordinary
    weights are done after a third of it.
    """
    shape, groups = groups.shape[:-1], groups.reshape(-1, groups.shape[-1])
    # On a CPU few enough groups at a time for the cache: twice as fast.
    some = (
        max(1, CPU_ELEMENTS * torch.get_num_threads() // groups.shape[1])
        if groups.device.type == "cpu"
        else len(groups)
    )
    signed = grid.symmetric and grid.bits <= SIGNED_BITS
    find = _either_sign if signed else _search
    found = [find(part, grid, p, weight, ratios) for part in groups.split(max(1, some))]
    zeros = None if grid.symmetric else torch.cat([f[1] for f in found if f[1] is not None]).view(shape)
    return torch.cat([f[0] for f in found]).view(shape), zeros


def _either_sign(
    groups: Tensor, grid: IntGrid, p: float, weight: Tensor | None, ratios: Sequence[float]
) -> tuple[Tensor, None, Tensor]:
    """`_search` with a scale of either sign."""
    up, _, error = _search(groups, grid, p, weight, ratios)
    down, _, other = _search(-groups, grid, p, weight, ratios)
    return torch.where(other < error, -down, up), None, torch.minimum(error, other)


def _search(
    groups: Tensor, grid: IntGrid, p: float, weight: Tensor | None, ratios: Sequence[float]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`search` of [n, g] groups at once, and the error of what it found."""
    scale, zero = full_range(groups, grid)
    half = float(grid.levels // 2)
    state = _Searched(
        groups, scale, zero, rounding_error(groups, scale, half if zero is None else zero, grid, p, weight)
    )
    full, low, done = scale, groups.amin(-1).clamp_max(0), []
    rows = torch.arange(len(groups), device=groups.device)
    every = max(1, PRUNE_EVERY * len(ratios) // len(RATIOS))
    for number, ratio in enumerate(ratios):
        if number and number % every == 0:
            open_ = (
                _clipping_error(state.groups, full * ratio, grid, p, weight, low * ratio) * (1 - 1e-4)
                < state.best
            )
            done.append((rows[~open_], state.of(~open_)))
            rows, state, full, low = rows[open_], state.of(open_), full[open_], low[open_]
            if not len(rows):
                break
        scale = round_scale(full * ratio, grid)
        if state.zero is None:
            state.offer(scale, None, rounding_error(state.groups, scale, half, grid, p, weight))
            continue
        middle = (-low * ratio / scale).round()
        for shift in (-1, 0, 1):
            zero = (middle + shift).clamp(0, grid.levels - 1)
            state.offer(scale, zero, rounding_error(state.groups, scale, zero, grid, p, weight))
    done.append((rows, state))
    order = torch.cat([rows for rows, _ in done]).argsort()
    zeros = None if state.zero is None else torch.cat([s.zero for _, s in done if s.zero is not None])[order]
    return torch.cat([s.scale for _, s in done])[order], zeros, torch.cat([s.best for _, s in done])[order]


@dataclass
class _Searched:
    """Some groups [n, g] and the best of what was tried on each of them: scale, zero and error [n]."""

    groups: Tensor
    scale: Tensor
    zero: Tensor | None
    best: Tensor

    def offer(self, scale: Tensor, zero: Tensor | None, error: Tensor) -> None:
        better = error < self.best
        self.best = torch.where(better, error, self.best)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def of(self, chosen: Tensor) -> "_Searched":
        return _Searched(
            self.groups[chosen],
            self.scale[chosen],
            None if self.zero is None else self.zero[chosen],
            self.best[chosen],
        )


def _clipping_error(
    groups: Tensor, scale: Tensor, grid: IntGrid, p: float, weight: Tensor | None, low: Tensor
) -> Tensor:
    """No more than `rounding_error` at this scale [n] or any smaller one: what lies beyond the ends of the
    range, counted from there. Three steps are given away at each end of an asymmetric range: for the zero
    points beside the middle one, and for rounding."""
    if grid.symmetric:
        least, most = -(grid.levels // 2) * scale, (grid.levels // 2 - 1) * scale
    else:
        least, most = low - 3 * scale, low + (grid.levels + 2) * scale
    slack = 1 + 2**-7  # scales are rounded, to bfloat16 at worst
    outside = (
        torch.maximum(groups - (most * slack).unsqueeze(-1), (least * slack).unsqueeze(-1) - groups)
        .clamp_min_(0)
        .pow_(p)
    )
    return (outside if weight is None else outside * weight).sum(-1)


def by_rows(weight: Tensor, grid: IntGrid, rule) -> PackedWeight:
    """Apply rule([n, G, g]) -> ([n, G], [n, G] | None) to chunks of rows, then round the weight onto the
    result.
    """
    scales, zeros = [], []
    for rows in row_chunks(*weight.shape):
        scale, zero = rule(grouped(weight[rows].float(), grid.group_size))
        scales.append(scale)
        zeros.append(zero)
    zero = None if grid.symmetric else torch.cat(zeros).t()
    return PackedWeight.quantize(weight, torch.cat(scales).t(), zero, grid)


def absmax(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """scale = max |w| / ((2^bits - 1) / 2), symmetric (the rule of compressed-tensors)."""
    return by_rows(weight, grid, lambda groups: full_range(groups, grid))


def minmax(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """scale = (max - min) / (2^bits - 1) with 0 inside the range, zero = round(-min / scale)."""
    return by_rows(weight, grid, lambda groups: full_range(groups, grid))


def mse(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """Search over clipping: the scale (and zero) with the least sum |w - Q(w)|^p per group, p = stats.p."""
    return by_rows(weight, grid, lambda groups: search(groups, grid, stats.p))
