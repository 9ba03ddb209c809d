"""grid_codes: where the adapter wants each weight to be, rounded onto the grid. The integers that ship.

In unsigned code units, with c the base code, rho its decoded residual, z0 and s0 the base grid, D = gain * B
A (the low-rank product, fp32) and (S, z, T) the grid being trained:

    units = "grid"      v = c + rho + D                                    LR-QAT: D counts grid steps
    units = "weight"    v = c + rho + D / s0                               DL-QAT: D is in weight units, the
                        grid is frozen
    units = "live"      v = (s0 (c - z0 + rho) + D - T) / S + z            L4Q: the base is re-gridded with
                        the live scale

A `mask` holds one bit per weight: where it is set the code is the zero point z of the grid that is trained,
whatever v is, so the weight is S (z - z) = 0. It moves with nothing and nothing learns from it.

A dense D [R, K] (`delta`) counts grid steps and is of the rows it names; the codes of all other rows are the
base's. Nothing is added up there, so its codes are the same on every device.

    code = clip(round_half_even(v), lowest, 2^bits - 1)

`lowest` is 0, or 1 on a grid that leaves its lowest code unused, so that it is the same to either side of its
zero point (at 2 bits: ternary).

`round_then_clip` and `clip_then_round` give the same code; they differ in where the gradient is cut
(grid_linear.py). D is computed per chunk of rows by one fp32 matrix product whose chunking is fixed by
layout.CHUNK_ELEMENTS, so training, evaluation and merge, which all call this op, agree bit for bit. Clamping
happens on the float, before the integer cast.
"""

import torch
from torch import Tensor

from .grid import GridWeight, flat
from .layout import (
    centred,
    grouped,
    outside_autocast,
    pack_rows,
    packed_width,
    per_group,
    row_chunks,
    ungrouped,
    unpack_rows,
)
from .pack import decode_residual

UNITS = ("grid", "weight", "live")


def grid_values(
    rows: slice,
    grid: GridWeight,
    in_features: int,
    group_size: int,
) -> Tensor:
    """v of some of the moved rows (`rows` of grid.moved, which lie at grid.place(rows)), before rounding:
    fp32 [n, G, g] (padded columns hold nothing of meaning).
    """
    _, residual, scale0, zero0, a, b, _, _, scale, zero, offset, _, gain, units, bits, residual_bits, _ = grid
    at = grid.place(rows)
    value = unpack_rows(grid.codes[at], bits, in_features, torch.float32)
    if residual is not None and residual_bits:
        value = value + decode_residual(residual[at], residual_bits, in_features)
    value = grouped(value, group_size)
    if grid.delta is not None:
        return value.add_(grouped(grid.delta[rows].float(), group_size))
    # The gain multiplies the small factor, so that one product gives D.
    delta = None if a is None or b is None else grouped((b[rows].float() * gain) @ a.float(), group_size)
    if units == "live":
        value = centred(value, zero0, bits, rows).mul_(per_group(scale0, rows))
        if delta is not None:
            value.add_(delta)
        if offset is not None:
            value.sub_(per_group(offset, rows))
        value.div_(per_group(scale, rows))
        return value.add_(float(1 << (bits - 1)) if zero is None else per_group(zero, rows))
    if delta is None:
        return value
    return value.add_(delta if units == "grid" else delta.mul_(per_group(scale0, rows).reciprocal()))


def locked(rows: slice, grid: GridWeight, in_features: int, group_size: int) -> Tensor | None:
    """What of some moved rows (as in `grid_values`) the mask calls zero: bool [n, G, g]; None without one."""
    if grid.mask is None:
        return None
    bits = unpack_rows(grid.mask[grid.place(rows)], 1, in_features, torch.uint8)
    return grouped(bits, group_size).bool()


def refuse(grid: GridWeight) -> None:
    """ValueError where the fields of a grid do not go together."""
    if grid.units not in UNITS:
        raise ValueError(f"units={grid.units!r}: allowed are {UNITS}")
    if grid.delta is not None and (grid.low or grid.units != "grid"):
        raise ValueError(
            f"delta counts grid steps and stands alone: got units={grid.units!r}"
            f"{' and a low-rank part' * grid.low}; units='grid' without a and b is allowed"
        )


@torch.library.custom_op("lowbit::grid_codes", mutates_args=())
@outside_autocast
@flat
def grid_codes(
    grid: GridWeight,
    in_features: int,
    group_size: int,
) -> Tensor:
    """The codes of the adapted weight, packed (see the file's head for the equation).

    Returns int16 [N, W].
    """
    refuse(grid)
    if not grid.moves:
        return grid.codes.clone()
    out, top = [], (1 << grid.bits) - 1
    for rows in row_chunks(grid.moved, in_features):
        code = grid_values(rows, grid, in_features, group_size).round_().clamp_(grid.lowest, top)
        if (zeros := locked(rows, grid, in_features, group_size)) is not None:
            z = None if grid.zero is None else per_group(grid.zero, grid.place(rows))
            code = torch.where(zeros, float(1 << (grid.bits - 1)) if z is None else z, code)
        out.append(pack_rows(ungrouped(code, in_features).to(torch.uint8), grid.bits))
    packed = torch.cat(out)
    return packed if grid.rows is None else grid.codes.index_copy(0, grid.rows, packed)


@grid_codes.register_fake
@flat
def _(grid, in_features, group_size):
    return grid.codes.new_empty(grid.codes.shape[0], packed_width(in_features, grid.bits))
