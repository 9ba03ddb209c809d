"""mean: LLM-QAT's levels of one and two bits, scaled by the mean size of a group (arXiv 2305.17888).

    1 bit    w^ = m sign(w),                                       m = mean |w| over the group
    2 bits   w^ = s (round(2 clamp(w / s, +-0.99) - 1/2) + 1/2) / 2,  s = 2 m:   +-m/2, +-3m/2

No level is 0, so integers of as many bits cannot hold them (their zero point is a whole step). Sign planes of
scales m and m / 2 do, exactly: b_1 is the sign, b_2 the sign again on the outer levels and the other one on
the inner levels. From three bits on LLM-QAT has plain absmax integers. Its groups are whole rows.
m is rounded to the shipping dtype before the levels are chosen.
"""

import torch
from lowbit_kernels.layout import grouped, row_chunks, ungrouped
from torch import Tensor

from ..binary import BinaryGrid
from ..estimators import away_from_zero
from ..packed import BinaryWeight
from .ranges import Stats

MEAN_BITS = (1, 2)
EDGE = 0.99  # of w / s, LLM-QAT's: what lies beyond is on the outer level


def mean(weight: Tensor, grid: BinaryGrid, stats: Stats) -> BinaryWeight:
    """weight [N, K] fp32 -> one or two planes."""
    assert grid.bits in MEAN_BITS, "Calibrator.reject was ignored"
    k, dtype = weight.shape[1], getattr(torch, grid.scale_dtype)
    valid = grouped(torch.ones(1, k, device=weight.device), grid.group_size)[0]  # [G, g], 0 in the pads
    signs, scales = [], []
    for rows in row_chunks(*weight.shape):
        w = grouped(weight[rows].float(), grid.group_size)  # [n, G, g]
        size = (w.abs() * valid).sum(-1) / valid.sum(-1)
        # twice the least scale, so that half of it is still one
        m = (2 * away_from_zero(size / 2)).to(dtype).float()
        planes, alphas = [w >= 0], [m]
        if grid.bits == 2:
            level = torch.round((w / (2 * m.unsqueeze(-1))).clamp(-EDGE, EDGE) * 2 - 0.5)  # -2, -1, 0, 1
            planes = [level >= 0, (level == 1) | (level == -1)]
            alphas = [m, m / 2]
        signs.append(torch.stack([ungrouped(plane, k) for plane in planes]).to(torch.uint8))
        scales.append(torch.stack(alphas))
    return BinaryWeight.pack(torch.cat(signs, 1), torch.cat(scales, 1).transpose(1, 2), grid)
