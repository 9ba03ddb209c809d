"""K7: grid_codes on a GPU. Low-rank product or dense part, round, clip, mask and P16 packing in one pass:
16-bit weights never exist.

A program owns BLOCK_N rows of one superblock. For each plane (32 channels) it makes D on the tensor cores or
reads it, adds the base, rounds and ors the codes into the half-words it writes at the end. The arithmetic is
grid_triton.py's, which says why its bits are the same everywhere. For the same reason the table of tiles is
asked with nothing of the shape but the rank: M does not enter at all, and a slice of a layer gives the codes
of the whole layer. A dense part of some rows is of these rows only: the rest of the codes is a copy.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .codes import refuse
from .grid import GridWeight, flat
from .grid_triton import (
    FP_OPTIONS,
    base_value,
    channels_of,
    code_bits,
    dense,
    given,
    grid_value,
    group_row,
    group_values,
    locked,
    low_rank,
    plane_words,
    rank_block,
    source_rows,
)
from .launch import cdiv, launch
from .layout import packed_width, superblock
from .triton_common import LANE, launch_options, lines_of, plane_group


@triton.jit
def grid_codes_kernel(
    codes, residual, scale0, zero0, a, b, scale, zero, offset, mask, delta, rows, out, gain, N, K, moved,
    codes_row, residual_row, mask_row, out_row,
    UNITS_LIVE: tl.constexpr, UNITS_WEIGHT: tl.constexpr, BITS: tl.constexpr, LOWEST: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Grid (superblocks, blocks of the `moved` rows). *_row are row strides in half-words; GROUP a multiple
    of 32 or 0; EVEN_K: K fills its last superblock. delta [moved, K] is dense, of the rows `rows`."""
    S: tl.constexpr = channels_of(BITS)
    PLANES: tl.constexpr = S // 32
    LINES: tl.constexpr = lines_of(BITS)
    block = tl.program_id(0)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    live_rows = rn < moved
    source = source_rows(rows, rn, live_rows)
    far = source.to(tl.int64)[:, None]  # a row offset passes 2^31 in a large layer
    line = (block * LINES * LANE + lane)[None, :]
    words = tl.load(codes + far * codes_row + line, mask=live_rows[:, None], other=0)
    words = words.to(tl.int32)
    place = 1
    packed = tl.zeros((BLOCK_N, LANE), tl.int32)
    high = tl.zeros((BLOCK_N, LANE), tl.int32)
    for p in range(
        PLANES
    ):  # a loop, not unrolled: half the registers, and the next plane's loads can be in flight
        k0 = block * S + 32 * p
        kk = k0 + lane
        fraction, shift_f = words, 0
        if RESIDUAL_BITS:
            fraction, shift_f = plane_words(residual, residual_row, source, live_rows, k0, K, RESIDUAL_BITS)
        if BITS == 6:
            own, _ = plane_words(codes, codes_row, source, live_rows, k0, K, BITS)
            base = base_value(own, 0, fraction, shift_f, BITS, RESIDUAL_BITS)
        else:
            base = base_value(words, BITS * p, fraction, shift_f, BITS, RESIDUAL_BITS)
        move = None
        if R > 0:
            move = low_rank(a, b, gain, rn, kk, N, K, R, BLOCK_R, BLOCK_N, LANE)
        elif delta is not None:
            there = live_rows[:, None] & (kk < K)[None, :]
            move = tl.load(delta + rn.to(tl.int64)[:, None] * K + kk[None, :], mask=there, other=0.0)
            move = move.to(tl.float32)
        at = group_row(k0, K, GROUP) * N + source
        value = grid_value(
            base, move, scale0, zero0, scale, zero, offset, at, live_rows, UNITS_LIVE, UNITS_WEIGHT, BITS
        )
        code = code_bits(value, BITS, LOWEST)
        if mask is not None:
            point = 1 << (BITS - 1)
            if zero is not None:
                point = group_values(zero, at, live_rows, 0.0).to(tl.int32)
            code = tl.where(locked(mask, mask_row, source, live_rows, k0, K), point, code)
        if not EVEN_K:
            code = tl.where((kk < K)[None, :], code, 0)
        if BITS == 6:
            packed |= (code & 15) << (p % 4 * 4)
            high |= ((code >> 4) & 3) << (p * 2)
            if p % 4 == 3:
                low = out + far * out_row + line + p // 4 * LANE
                tl.store(low, packed.to(tl.int16), mask=live_rows[:, None])
                packed = tl.zeros((BLOCK_N, LANE), tl.int32)
        else:
            # One multiply-add: what code_bits leaves above the code lies above bit 16, lost in the store.
            packed += code * place
            place *= 1 << BITS
    to = out + far * out_row + line
    if BITS == 6:
        tl.store(to + 2 * LANE, high.to(tl.int16), mask=live_rows[:, None])
    else:
        tl.store(to, packed.to(tl.int16), mask=live_rows[:, None])


# --------------------------------------------------------------------------------------------------- launcher


@flat
def grid_codes(
    grid: GridWeight,
    in_features: int,
    group_size: int,
) -> Tensor:
    """The op of codes.py: int16 [N, W]. Same arguments, same errors; group_size a multiple of 32 or -1."""
    refuse(grid)
    if not grid.moves:
        return grid.codes.clone()
    n, bits = grid.codes.shape[0], grid.bits
    some = grid.rows is not None
    out = grid.codes.clone() if some else grid.codes.new_empty(n, packed_width(in_features, bits))
    span = plane_group(group_size, in_features)
    state, strides, constants = given(grid, zero=grid.live or grid.mask is not None)
    # Only the rank is told to the table: see the file's head.
    config = dispatch.config("grid_codes", bits, torch.float32, M=max(1, constants["R"]), N=1, K=1)
    blocks = (cdiv(in_features, superblock(bits)), cdiv(grid.moved, config["BLOCK_N"]))
    launch(
        grid_codes_kernel,
        blocks,
        *state,
        dense(grid.delta),
        dense(grid.rows),
        out,
        grid.gain,
        n,
        in_features,
        grid.moved,
        *strides,
        out.stride(0),
        **constants,
        GROUP=span,
        BLOCK_N=config["BLOCK_N"],
        EVEN_K=in_features % superblock(bits) == 0,
        **launch_options(config),
        **FP_OPTIONS,
    )
    return out


# ----------------------------------------------------------------------------------------------- what we ship


def _case(
    bits: int, residual_bits: int, rank: int, units: str, also: tuple[str, ...] = (), lowest: int = 0
) -> tuple:
    """also: of "delta" (without a rank), "rows" and "mask" those that are there."""
    config = dispatch.packaged("grid_codes", bits, torch.float32, M=rank, N=1, K=1, arch=80)
    live, asymmetric = units == "live", units == "live"
    kinds = {"delta": "*fp32", "rows": "*i64", "mask": "*i16"}
    pointers = {"codes": "*i16", "scale0": "*bf16", "scale": "*fp32", "out": "*i16"}
    pointers |= {name: kinds[name] for name in also}
    if rank:
        pointers |= {"a": "*fp32", "b": "*fp32"}
    if residual_bits:
        pointers["residual"] = "*i16"
    if asymmetric:
        pointers |= {"zero0": "*u8", "zero": "*u8"}
    sizes = dict.fromkeys(("N", "K", "moved", "codes_row", "residual_row", "mask_row", "out_row"), "i32")
    optional = ("residual", "zero0", "a", "b", "zero", "offset", *kinds)
    absent = {name: None for name in optional if name not in pointers}
    constants = absent | {
        "UNITS_LIVE": live,
        "UNITS_WEIGHT": units == "weight",
        "BITS": bits,
        "LOWEST": lowest,
        "RESIDUAL_BITS": residual_bits,
        "GROUP": 128,
        "R": rank,
        "BLOCK_R": rank_block(rank),
        "BLOCK_N": config["BLOCK_N"],
        "EVEN_K": True,
    }
    options = {**launch_options(config), **FP_OPTIONS}
    above = ("above",) if lowest else ()
    name = "-".join((f"grid-codes-{bits}bit-f{residual_bits}-r{rank}-{units}", *also, *above))
    return (
        name,
        grid_codes_kernel,
        pointers | sizes | {"gain": "fp32"},
        constants,
        options,
        config["BLOCK_N"] * 32,
    )


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles. The hot loop handles one plane."""
    return [
        _case(4, 4, 64, "grid"),
        _case(4, 4, 16, "grid"),
        _case(4, 4, 64, "weight"),
        _case(4, 4, 64, "live"),
        _case(3, 4, 64, "grid"),
        _case(2, 4, 32, "grid"),
        _case(8, 0, 64, "grid"),
        _case(6, 4, 64, "grid"),
        _case(4, 4, 64, "grid", ("mask",)),
        _case(4, 4, 64, "live", ("mask",)),
        _case(4, 4, 0, "grid", ("delta",)),
        _case(3, 4, 0, "grid", ("delta", "rows", "mask")),
        _case(2, 4, 32, "grid", lowest=1),
        _case(2, 4, 64, "live", lowest=1),
        _case(2, 4, 0, "grid", ("delta",), lowest=1),
    ]
