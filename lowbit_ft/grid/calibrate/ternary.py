"""ternary: -s, 0, s of every group, as TWN chooses them (arXiv 1605.04711, Eq. 6 and 7).

    t = 0.7 mean |w|        q = sign(w) where |w| > t, else 0        s = mean |w| over those        W^ = s q

They are three of the four codes of two bits; the lowest stays unused while codes train too (IntGrid.narrow).
The threshold is not half of s, so this is not rounding: the residual of a weight that is nearer to another
level ends at the edge of its own, and one of more than 3/2 s is cut there. TWN's groups are whole tensors;
here they are the grid's. s is rounded to its dtype last.
"""

from dataclasses import replace

import lowbit_kernels as kernels
import torch
from lowbit_kernels.layout import grouped, row_chunks, ungrouped
from torch import Tensor

from ..integer import IntGrid
from ..packed import PackedWeight
from .ranges import Stats, round_scale

TERNARY_BITS = (2,)
THRESHOLD = 0.7  # of mean |w|: TWN's, near the best one for weights that are normal, or spread evenly


def ternary(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """weight [N, K] -> codes of -1, 0 and 1, counted from the zero point."""
    assert grid.bits in TERNARY_BITS and grid.symmetric, "Calibrator.reject was ignored"
    k, steps = weight.shape[1], 1 << grid.residual_bits
    valid = grouped(torch.ones(1, k, device=weight.device), grid.group_size)[0]  # [G, g], 0 in the pads
    codes, residuals, scales = [], [], []
    for rows in row_chunks(*weight.shape):
        w = grouped(weight[rows].float(), grid.group_size)  # [n, G, g]
        size = w.abs().double()
        mean = size.sum(-1) / valid.sum(-1)
        chosen = size > THRESHOLD * mean.unsqueeze(-1)
        level = (size * chosen).sum(-1) / chosen.sum(-1).clamp_min(1)
        scale = round_scale(level.float(), grid)
        q = w.sign() * chosen
        codes.append(kernels.pack(ungrouped(q + grid.levels // 2, k).to(torch.uint8), grid.bits))
        scales.append(scale)
        if grid.residual_bits:
            fraction = (w / scale.unsqueeze(-1) - q + 0.5) * steps
            field = ungrouped(fraction, k).floor().clamp_(0, steps - 1).to(torch.uint8)
            residuals.append(kernels.pack(field, grid.residual_bits))
    return PackedWeight(
        codes=torch.cat(codes),
        residual=torch.cat(residuals) if residuals else None,
        scale=torch.cat(scales).t().to(getattr(torch, grid.scale_dtype)).contiguous(),
        shape=(weight.shape[0], k),
        grid=replace(grid, mask=False),
    )
