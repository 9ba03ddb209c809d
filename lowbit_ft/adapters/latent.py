"""What an adapter's tensors do to the values that are rounded: how far they move them, and to their codes.

A value v (lowbit_kernels/codes.py) is the base in grid steps plus what trains; the code is clip(round(v)).
Of a low-rank part, v = v0 + gain B A / unit, with the unit that its product is counted in (GridArgs.unit).
Of a dense part, v = v0 + D in the rows that it is of: a step is 1, the pull is e, and D is drawn by -share e.

    one step     the standard deviation of independent changes of B (or of A) by which v changes by 1, root
                 mean square: the unit in which train.gradient counts what it perturbs
    apart        e = v - code, chunk by chunk: N x K of it never exists
    pull         the gradient of |e|^2 / 2 for what is trained, the codes held: dB = gain E A^T,
                 dA = gain B^T E, with E = e / unit
    drawn        how B has to move that v comes nearer to its code by a share of e, as near as the rows of A
                 let it: the least-squares solution of  gain dB A = -share e unit

`skip_clipped` leaves values alone that lie beyond the last code: nothing rounds them. Masked ones (e = 0) are
left alone always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from lowbit_kernels.codes import grid_values, locked
from lowbit_kernels.grid import GridWeight
from lowbit_kernels.layout import grouped, per_group, row_chunks, ungrouped
from torch import Tensor

from ..grid import BinaryGrid, GridArgs, IntGrid, PackedWeight

RIDGE = 1e-6  # of the mean of the diagonal, so that rows of A which are alike are no division by zero


def step_of_scale(grid: IntGrid | BinaryGrid) -> float:
    """The relative change of a scale by which its weights move by one step: 1 over the size of a centred
    code, taken as spread evenly over the range. Of a sign plane, whose scale is its step: 1."""
    return 1.0 if isinstance(grid, BinaryGrid) else math.sqrt(12) / grid.levels


def steps_of_product(a: Tensor, b: Tensor, gain: float, unit: Tensor | None) -> dict[str, Tensor]:
    """{"A", "B"}: fp32 scalars, of A [r, K], B [N, r] and the unit [G, N] of gain B A (None: grid steps).

    A change of A does nothing where B is 0; it is held to the size of A itself."""
    per = gain if unit is None else gain * unit.float().reciprocal().square().mean().sqrt()
    small = torch.finfo(torch.float32).tiny
    step_b = math.sqrt(a.shape[1]) / (per * a.norm()).clamp_min(small)
    step_a = math.sqrt(b.shape[0]) / (per * b.norm()).clamp_min(small)
    return {"A": torch.minimum(step_a, a.square().mean().sqrt()), "B": step_b}


def unit_of(args: GridArgs, base: PackedWeight) -> Tensor | None:
    """What the low-rank product is counted in, [G, N]; None: grid steps."""
    if args.units == "grid":
        return None
    if args.units == "live":
        return args.scale
    return base.scale if args.unit is None else args.unit


def apart(base: PackedWeight, grid: GridWeight, skip_clipped: bool) -> Iterator[tuple[slice, Tensor]]:
    """(rows, e fp32 [n, G, g]) of the weight that `grid` says, chunk by chunk of the rows that it moves; 0 in
    the pads of a ragged last group."""
    k, size, low, top = base.shape[1], base.grid.group_size, base.grid.lowest, base.grid.levels - 1
    for rows in row_chunks(grid.moved, k):
        value = grid_values(rows, grid, k, size)
        rounded = value.round()
        error = value - rounded.clamp(low, top)
        if skip_clipped:
            error.masked_fill_((rounded < low) | (rounded > top), 0)
        if (zeros := locked(rows, grid, k, size)) is not None:
            error.masked_fill_(zeros, 0)
        yield rows, grouped(ungrouped(error, k), size)


@torch.no_grad()
def pull(base: PackedWeight, args: GridArgs, skip_clipped: bool) -> dict[str, Tensor]:
    """{"A": dA [r, K], "B": dB [N, r]} or {"delta": dD [R, K]}, fp32; {} where nothing moves a value."""
    if args.delta is not None:
        return {"delta": _dense(base, args, 1.0, skip_clipped)}
    if args.a is None or args.b is None:
        return {}
    a, b, unit = args.a.float(), args.b.float() * args.gain, unit_of(args, base)
    da, db = torch.zeros_like(a), torch.empty_like(b)
    for rows, error in apart(base, base.on_grid(args), skip_clipped):
        wide = error if unit is None else error / per_group(unit, rows)
        e = ungrouped(wide, base.shape[1])
        db[rows] = e @ a.t() * args.gain
        da += b[rows].t() @ e
    return {"A": da, "B": db}


@torch.no_grad()
def drawn(
    base: PackedWeight, args: GridArgs, share: float, skip_clipped: bool, parts: int = 1
) -> dict[str, Tensor]:
    """{"B": dB [N, r]} or {"delta": dD [R, K]}, fp32; {} where nothing moves a value. parts: of A, one below
    the other, each of which has rows of its own (low_rank.py): dB as if each part were alone."""
    if args.delta is not None:
        return {"delta": _dense(base, args, -share, skip_clipped)}
    if args.a is None or args.b is None:
        return {}
    a, unit = args.a.double(), unit_of(args, base)
    square, rank = a @ a.t(), len(a) // parts
    if parts > 1:
        square *= torch.block_diag(*[torch.ones(rank, rank, dtype=a.dtype, device=a.device)] * parts)
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    # e A^T (A A^T)^-1, for all rows: K x r once, and one thin product per chunk
    solve = torch.linalg.solve_ex(square, a)[0].t().float()
    db = torch.empty(args.b.shape, dtype=torch.float32, device=a.device)
    for rows, error in apart(base, base.on_grid(args), skip_clipped):
        wide = error if unit is None else error * per_group(unit, rows)
        db[rows] = ungrouped(wide, base.shape[1]) @ solve
    return {"B": db.mul_(-share / args.gain)}


def _dense(base: PackedWeight, args: GridArgs, factor: float, skip_clipped: bool) -> Tensor:
    """factor e of the rows of a dense part, fp32 [R, K]: as large as what trains, and no larger."""
    assert args.delta is not None
    out = torch.empty_like(args.delta, dtype=torch.float32)
    for rows, error in apart(base, base.on_grid(args), skip_clipped):
        out[rows] = ungrouped(error, base.shape[1]) * factor
    return out
