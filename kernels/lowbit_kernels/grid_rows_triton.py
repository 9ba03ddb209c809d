"""grid_row_gradients on a GPU: dD, dS and dT of a dense part from dW of its rows alone.

As in the chunked form of grid_gradients the BLAS makes dW of a chunk of the chosen rows (R / N of a product
in all) in scratch that stays in L2, and one pass over it recomputes v as grid_codes did, masks by the clip
and writes dD, which is read by the optimizer and so is the one thing of size R x K in memory. Per weight the
pass moves 4 bytes of D, 4 of dD, the packed codes and residual, and 2 + 2 of dW, which are L2's; the
reference's passes over fp32 chunks move some 160.

No form on chip: it would save the 2 + 2 bytes of dW and cost one more kernel. Sums over a group are partial
sums over strips of 32 channels, each written by one program and added in order, so that a run gives the same
bits again.
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
from .gradients_epilogue_triton import by_group
from .grid import GridWeight, flat
from .grid_triton import (
    FP_OPTIONS,
    base_value,
    clipped,
    dense,
    given,
    group_row,
    group_values,
    locked,
    plane_words,
    source_rows,
)
from .launch import cdiv, launch
from .scratch import row_chunk
from .triton_common import LANE, launch_options, plane_group


@triton.jit
def grid_rows_kernel(
    dw, delta, dd, codes, residual, scale, zero, mask, rows, sum_s, sum_t, start, count, N, K, moved,
    codes_row, residual_row, mask_row,
    CLIP_FIRST: tl.constexpr, BITS: tl.constexpr, LOWEST: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Grid (spans of SPAN strips, row blocks of the chunk). dw [count, K] is dW of the moved rows start and
    up, delta and dd [moved, K] are dense; writes sum_s, sum_t [strips, moved]."""
    HALF: tl.constexpr = (1 << (BITS - 1)) * 1.0
    span = tl.program_id(0)
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = local < count  # rows of the next chunk are not ours
    rn = start + local
    source = source_rows(rows, rn, live)
    for i in range(tl.minimum(SPAN, tl.cdiv(K, LANE) - span * SPAN)):
        strip = span * SPAN + i
        k0 = strip * LANE
        kk = k0 + tl.arange(0, LANE)
        there = live[:, None] & (kk < K)[None, :]
        here = rn.to(tl.int64)[:, None] * K + kk[None, :]
        piece = tl.load(dw + local.to(tl.int64)[:, None] * K + kk[None, :], mask=there, other=0.0)
        piece = piece.to(tl.float32)
        if mask is not None:
            piece = tl.where(locked(mask, mask_row, source, live, k0, K), 0.0, piece)
        words, shift = plane_words(codes, codes_row, source, live, k0, K, BITS)
        fraction, shift_f = words, shift
        if RESIDUAL_BITS:
            fraction, shift_f = plane_words(residual, residual_row, source, live, k0, K, RESIDUAL_BITS)
        value = base_value(words, shift, fraction, shift_f, BITS, RESIDUAL_BITS)
        value += tl.load(delta + here, mask=there, other=0.0).to(tl.float32)
        code, inside = clipped(value, CLIP_FIRST, BITS, LOWEST)
        at = group_row(k0, K, GROUP) * N + source
        if zero is None:
            z = tl.full((BLOCK_N, 1), HALF, tl.float32)
        else:
            z = group_values(zero, at, live, 0.0)
        out = strip.to(tl.int64) * moved + rn
        tl.store(sum_s + out, tl.sum(piece * (code - z), axis=1), mask=live)
        tl.store(sum_t + out, tl.sum(piece, axis=1), mask=live)
        learned = tl.where(inside, piece, 0.0) * group_values(scale, at, live, 0.0)
        tl.store(dd + here, learned, mask=there)


# --------------------------------------------------------------------------------------------------- launcher


@flat
def grid_row_gradients(
    x: Tensor, dy: Tensor, grid: GridWeight, group_size: int, clip_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of grid_rows.py: dS [G, R], dT [G, R], dD [R, K], fp32. group_size a multiple of 32 or -1."""
    assert grid.delta is not None
    (m, k), moved = x.shape, grid.moved
    span, strips = plane_group(group_size, k), cdiv(k, LANE.value)
    config = dispatch.config("grid_row_gradients", grid.bits, x.dtype, M=m, N=moved, K=k)
    (codes, residual, *_, scale, zero, _, mask), strides, constants = given(grid, zero=True)
    delta, rows = dense(grid.delta), dense(grid.rows)
    dd = torch.empty(moved, k, dtype=torch.float32, device=x.device)
    sum_s, sum_t = torch.empty(2, strips, moved, dtype=torch.float32, device=x.device)
    step = max(1, row_chunk(moved, k, x.element_size(), config))  # of no rows nothing is made
    scratch = torch.empty(step, k, dtype=x.dtype, device=x.device)
    for start in range(0, moved, step):
        count = min(step, moved - start)
        some = grid.place(slice(start, start + count))
        dw = torch.mm(dy[:, some].t(), x, out=scratch[:count])
        launch(
            grid_rows_kernel,
            (cdiv(strips, config["SPAN"]), cdiv(count, config["BLOCK_N"])),
            dw,
            delta,
            dd,
            codes,
            residual,
            scale,
            zero,
            mask,
            rows,
            sum_s,
            sum_t,
            start,
            count,
            grid.codes.shape[0],
            k,
            moved,
            *strides,
            CLIP_FIRST=clip_first,
            BITS=grid.bits,
            LOWEST=grid.lowest,
            RESIDUAL_BITS=constants["RESIDUAL_BITS"],
            GROUP=span,
            BLOCK_N=config["BLOCK_N"],
            SPAN=config["SPAN"],
            **launch_options(config),
            **FP_OPTIONS,
        )
    per_group = strips if span == 0 else span // LANE.value
    return by_group(sum_s, per_group), by_group(sum_t, per_group), dd


# ----------------------------------------------------------------------------------------------- what we ship


def _case(bits: int, dtype: str, *also: str) -> tuple:
    """also: of "rows", "zero" and "mask" those that are there; "above": the lowest code is not used."""
    config = dispatch.packaged("grid_row_gradients", bits, torch.bfloat16, 4096, 4096, 4096, 80)
    kinds = {"zero": "*u8", "mask": "*i16", "rows": "*i64"}
    pointers = {"dw": f"*{dtype}", "codes": "*i16", "residual": "*i16"}
    pointers |= dict.fromkeys(("delta", "dd", "scale", "sum_s", "sum_t"), "*fp32")
    pointers |= {name: kinds[name] for name in also if name in kinds}
    sizes = ("start", "count", "N", "K", "moved", "codes_row", "residual_row", "mask_row")
    constants = {name: None for name in kinds if name not in pointers} | {
        "CLIP_FIRST": False,
        "BITS": bits,
        "LOWEST": int("above" in also),
        "RESIDUAL_BITS": 4,
        "GROUP": 128,
        "BLOCK_N": config["BLOCK_N"],
        "SPAN": config["SPAN"],
    }
    return (
        "-".join((f"grid-rows-{bits}bit-{dtype}", *also)),
        grid_rows_kernel,
        pointers | dict.fromkeys(sizes, "i32"),
        constants,
        {**launch_options(config), **FP_OPTIONS},
        config["BLOCK_N"] * LANE.value,
    )


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles. The hot loop handles one strip."""
    return [
        _case(4, "bf16"),
        _case(4, "bf16", "rows"),
        _case(4, "bf16", "rows", "zero", "mask"),
        _case(3, "fp32", "mask"),
        _case(2, "bf16", "zero"),
        _case(2, "bf16", "above"),
    ]
