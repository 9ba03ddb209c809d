"""narrow_range: absmax without the lowest code, so that nothing is clipped (GLM-130B, arXiv 2210.02414).

    s = max|w| / (2^(b-1) - 1)        q = round(w / s), within +-(2^(b-1) - 1)        W^ = s q

The largest weight of a group is its own code times the scale, and the grid is the same to either side of 0:
at 2 bits it is -s, 0, s. `absmax` divides by (2^b - 1) / 2 instead: finer steps, and the largest weights are
clipped by half of one. GLM-130B's scales are float16 and of whole rows: `scale_dtype: float16`,
`group_size: -1`.

The released code divides by a scale of 0 where a row is all zero. Here no scale is below SMALLEST_SCALE
(estimators.py): such a row has codes of 0, and a row of less than that in every code has larger steps.
"""

from torch import Tensor

from ..integer import IntGrid
from ..packed import PackedWeight
from .ranges import Stats, by_rows, round_scale


def narrow_range(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """scale = max |w| / (2^(bits-1) - 1), symmetric."""
    top = grid.levels // 2 - 1
    return by_rows(weight, grid, lambda groups: (round_scale(groups.abs().amax(-1) / top, grid), None))
