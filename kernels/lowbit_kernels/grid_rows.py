"""grid_row_gradients: what a dense part D [R, K] of chosen rows learns, from dW of those rows alone.

D counts grid steps of its rows (codes.py). With dW' = (dY^T X)[rows], one product of R / N of the size of
dX's, q = code - z and M as in grid_linear.py:

    dD = S M dW'        dS = sum dW' q        dT = sum dW'        sums over the inputs of a group

Where a weight is masked dW' is put to 0 first. dW' exists one chunk of rows at a time; dD [R, K] is a
gradient that somebody keeps.
"""

import torch
from torch import Tensor

from .codes import grid_values, locked
from .grid import GridWeight, flat
from .layout import grouped, outside_autocast, per_group, row_chunks, ungrouped


@torch.library.custom_op("lowbit::grid_row_gradients", mutates_args=())
@outside_autocast
@flat
def grid_row_gradients(
    x: Tensor,
    dy: Tensor,
    grid: GridWeight,
    group_size: int,
    clip_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS [G, R], dT [G, R], dD [R, K] in fp32 from x [M, K] and dy [M, N] (equations at the file's head).

    Transient memory: the chosen columns of dy and a few fp32 chunks of layout.CHUNK_ELEMENTS.
    """
    assert grid.delta is not None
    k, top = x.shape[-1], (1 << grid.bits) - 1
    dd = torch.empty(grid.delta.shape, dtype=torch.float32, device=x.device)
    ds = torch.empty(grid.scale.shape[0], grid.moved, dtype=torch.float32, device=x.device)
    dt = torch.empty_like(ds)
    for rows in row_chunks(grid.moved, k):
        at = grid.place(rows)
        dw = grouped((dy[:, at].t() @ x).float(), group_size)
        if (zeros := locked(rows, grid, k, group_size)) is not None:
            dw.masked_fill_(zeros, 0)
        value = grid_values(rows, grid, k, group_size)
        rounded = value.round()
        inside = value if clip_first else rounded
        mask = (inside >= grid.lowest) & (inside <= top)
        z = float(1 << (grid.bits - 1)) if grid.zero is None else per_group(grid.zero, at)
        ds[:, rows] = (dw * (rounded.clamp_(grid.lowest, top) - z)).sum(-1).t()
        dt[:, rows] = dw.sum(-1).t()
        dd[rows] = ungrouped(dw.mul_(mask).mul_(per_group(grid.scale, at)), k)
    return ds, dt, dd


@grid_row_gradients.register_fake
@flat
def _(x, dy, grid, group_size, clip_first):
    scales = (grid.scale.shape[0], grid.moved)
    made = (x.new_empty(shape, dtype=torch.float32) for shape in (scales, scales, grid.delta.shape))
    return tuple(made)
