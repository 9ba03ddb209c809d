"""recover: a weight that is on a grid already, which its file does not say ("q4_0-unquantized" checkpoints).

Such a file holds w = r(s q), with r the rounding to its dtype, s a scale of its group and q = code - zero.
Each w leaves an interval of scales that round to it, ties to even included:

    low(w) <= s q <= high(w)        the scales of the group: the intersection over its weights

A guess of the code of the largest |w| gives the first interval; it says what every other q can be, and each q
of which there is no doubt narrows it.

A group is on the grid where some guess leaves a scale that the grid's scale_dtype has, and dequantized with
it gives the very numbers of the file. Larger codes are
tried first, on symmetric grids -2^(bits-1) first of all, which is llama.cpp's choice (with a scale of either
sign); where they are multiples of each other, so that several guesses fit, the codes are as good as any.

Where several scales give the same numbers (bfloat16 ones of a float16 scale), one that bfloat16 has is taken:
the largest weight of a bfloat16 master over 8 is such a one. Else the middle one, which need not be the one
that was published.
"""

from dataclasses import dataclass, field

import torch
from lowbit_kernels.layout import grouped
from torch import Tensor

from ..integer import SCALE_DTYPES, IntGrid
from ..packed import PackedWeight
from .ranges import Stats, round_scale

ELEMENTS = 1 << 18  # weights at a time, with some ten float64 copies of them
ROUNDS = 4  # of narrowing: 8-bit codes of bfloat16 numbers are told apart by the scale that the others leave


@dataclass
class Missed:
    """Groups that were looked at, and how many have no scale, by the dtype it would have."""

    groups: int = 0
    off: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SCALE_DTYPES, 0))

    def add(self, other: "Missed") -> None:
        self.groups += other.groups
        for name, count in other.off.items():
            self.off[name] += count


class OffGridError(ValueError):
    """Some group of a weight does not lie on the grid."""

    def __init__(self, missed: Missed, scale_dtype: str):
        self.missed = missed
        super().__init__(f"{missed.off[scale_dtype]} of {missed.groups} groups are not on this grid")


def recover(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """The base whose weight, rounded to the dtype of `weight` [N, K], is `weight`. OffGridError: there is
    none.
    """
    groups = grouped(weight.double(), grid.group_size)
    shape = groups.shape[:-1]
    scales, zeros, missed = [], [], Missed()
    some = max(1, ELEMENTS // groups.shape[-1])
    for part in groups.flatten(0, 1).split(some):
        scale, zero, found = _scales(part, grid, weight.dtype)
        scales.append(scale)
        zeros.append(zero)
        missed.add(found)
    scale, zero = torch.cat(scales).view(shape), torch.cat(zeros).view(shape)
    base = PackedWeight.quantize(weight, scale.t(), None if grid.symmetric else zero.t(), grid)
    if not missed.off[grid.scale_dtype]:
        # What was found by intervals, seen through the product that is computed (fp32 scales round twice).
        other = base.dequantize().to(weight.dtype) != weight
        missed.off[grid.scale_dtype] = int(grouped(other.byte(), grid.group_size).amax(-1).sum())
    if missed.off[grid.scale_dtype]:
        raise OffGridError(missed, grid.scale_dtype)
    return base


def _scales(groups: Tensor, grid: IntGrid, dtype: torch.dtype) -> tuple[Tensor, Tensor, Missed]:
    """Scale and zero [M] of float64 groups [M, g] that are numbers of `dtype`; else anything."""
    low, high = _interval(groups.abs(), dtype)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[:, 0]
    scale = round_scale(torch.zeros_like(largest, dtype=torch.float32), grid)
    zero = torch.full_like(scale, 0 if not grid.symmetric else grid.levels // 2)
    there = {name: largest == 0 for name in SCALE_DTYPES}
    for code in _guesses(grid):
        rows = torch.nonzero(~there[grid.scale_dtype])[:, 0]
        if not grid.symmetric:
            rows = rows[largest[rows].sign() == (1 if code > 0 else -1)]
        if not len(rows):
            continue
        kept, least, most, first = _fit(groups[rows], low[rows], high[rows], code, largest[rows], grid)
        rows = rows[kept]
        for name in SCALE_DTYPES:
            fits, value = _inside(least, most, name)
            fits &= ~there[name][rows]
            if name == grid.scale_dtype:
                scale[rows[fits]], zero[rows[fits]] = value[fits], first[fits]
            there[name][rows[fits]] = True
    off = {name: int((~found).sum()) for name, found in there.items()}
    return scale, zero, Missed(len(groups), off)


def _guesses(grid: IntGrid) -> list[int]:
    """Codes less zero that the largest weight of a group may have, the likeliest first."""
    if not grid.symmetric:
        return [sign * size for size in range(grid.levels - 1, 0, -1) for sign in (1, -1)]
    half = grid.levels // 2
    # The sign of the scale is that of the largest weight over its code: both are tried.
    return [-half, *(sign * size for size in range(half - 1, 0, -1) for sign in (1, -1))]


def _fit(
    groups: Tensor, low: Tensor, high: Tensor, code: int, largest: Tensor, grid: IntGrid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of float64 groups [m, g] whose largest weights have this code: which of them [k] are on the grid, their
    least and largest scale with its sign, and their zero points. low, high: of the weights' sizes.
    """
    rows = torch.arange(len(groups), device=groups.device)
    at = groups.abs().argmax(-1, keepdim=True)
    least, most = (ends.gather(-1, at)[:, 0] / abs(code) for ends in (low, high))
    for _ in range(ROUNDS):
        # The sizes of q that some scale in [least, most] allows; where it is one, it narrows the scales.
        first, last = (low[rows] / most[:, None]).ceil(), (high[rows] / least[:, None]).floor()
        alive = (first <= last).all(-1)
        rows, first, last, least, most = (x[alive] for x in (rows, first, last, least, most))
        one = (first == last) & (first != 0)
        q = first.masked_fill(~one, 1.0)
        least = torch.maximum(least, (low[rows] / q).masked_fill(~one, 0).amax(-1))
        most = torch.minimum(most, (high[rows] / q).masked_fill(~one, torch.inf).amin(-1))
        if bool((first == last).all()):
            break
    sign = (largest[rows] / code).sign()
    q = (groups[rows] / ((least + most) / 2 * sign)[:, None]).round()
    size = q.abs().clamp_min(1)
    counted = q != 0
    least = torch.maximum(least, (low[rows] / size).masked_fill(~counted, 0).amax(-1))
    most = torch.minimum(most, (high[rows] / size).masked_fill(~counted, torch.inf).amin(-1))
    bottom, top, half, end = q.amin(-1), q.amax(-1), grid.levels // 2, grid.levels - 1
    zero = torch.full_like(bottom, half) if grid.symmetric else (-bottom).clamp(0, end)
    fits = (counted | (groups[rows] == 0)).all(-1) & (bottom + zero >= 0) & (top + zero <= end)
    fits &= least <= most
    least, most = torch.where(sign > 0, least, -most), torch.where(sign > 0, most, -least)
    return rows[fits], least[fits], most[fits], zero[fits].float()


def _inside(least: Tensor, most: Tensor, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """Whether the dtype has a number in [least, most], and which is taken (fp32): one that bfloat16 has, or
    float16; else the nearest to the middle.
    """
    middle, own = (least + most) / 2, getattr(torch, scale_dtype)
    found = torch.zeros_like(middle, dtype=torch.bool)
    scale = torch.zeros_like(middle)
    for short in (torch.bfloat16, torch.float16, own):
        value = middle.to(short).double()
        fits = (value >= least) & (value <= most) & (value != 0) & (value.to(own).double() == value)
        scale = torch.where(fits & ~found, value, scale)
        found |= fits
    return found, scale.float()


def _interval(sizes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 ends of what rounds to each of `sizes` (numbers of `dtype`, none below 0): halfway to its
    neighbours, the ends included where its last bit is 0.
    """
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = sizes.to(dtype).contiguous().view(kind)
    above = (bits + 1).view(dtype).double()
    below = torch.where(sizes == 0, -above, (bits - 1).clamp_min(0).view(dtype).double())
    inward = torch.where(bits % 2 == 0, 0.0, torch.finfo(torch.float64).eps) * sizes
    return (sizes + below) / 2 + inward, (sizes + above) / 2 - inward
