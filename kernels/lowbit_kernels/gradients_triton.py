"""K5/K6: grid_gradients on a GPU: dS, dT, dA, dB from x and dY without keeping anything of size N x K.

Everything behind dW = dY^T X is one epilogue over a tile of dW (`epilogue`): recompute v and its code, mask
by the clip, sum over the inputs of a group, project the masked gradient on A and B. Three forms:

    chunked   dW of a chunk of rows by the BLAS into scratch, then one pass of the epilogue over it
    blas      the same, but the pass writes dD in the place of dW, and the BLAS projects it too: A and B as
              the sum of two bf16 numbers each (16 bits, as fp32 results need), dD rounded once more to bf16,
              as dW was
    fused     dW accumulates on chip over M and never leaves it

All are deterministic: a group sum and a projection are written as partial sums, each by the one program that
owns it, and added by torch in a fixed order. The epilogue works on strips of 32 channels, one P16 plane,
which no group splits: scale and zero are vectors over rows, and the fields of a strip have one shift. D comes
from codes_triton.low_rank, as in the forward, so the recomputed codes are the forward's.

Scale-only training with one group per row needs no dW at all: with Yq = X (code - z)^T, one product from
packed codes,

    dS[n] = sum_m dY[m, n] Yq[m, n]        dT[n] = sum_m dY[m, n] sum_k X[m, k]

With smaller groups dT could still be had from a product with K / g columns, but dS needs dW, in whose pass dT
is free.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .codes_triton import (
    FP_OPTIONS,
    base_value,
    channels_of,
    dense,
    dot_split,
    grid_value,
    group_row,
    group_values,
    low_rank,
    rank_block,
    rank_columns,
    rank_rows,
    row_dense,
)
from .launch import cdiv, launch
from .matmul import packed_matmul
from .scratch import CHUNKED, PROJECTION_BLOCK, gradient_chunk, gradient_form
from .triton_common import COMPUTE, INTERPRETED, LANE, compute_dtype, launch_options, plane_group, round_even

EXACT_ROWS = 32  # rows of a tile for fp32 inputs: split products need twice the operands


@triton.jit
def plane_words(packed, row, rn, k0, N, K, BITS: tl.constexpr):
    """The half-words that hold channels k0..k0+31 of some rows, int32 [BLOCK_N, 32], and the shift of
    their fields.
    """
    S: tl.constexpr = channels_of(BITS)
    at = packed + rn.to(tl.int64)[:, None] * row + (k0 // S * LANE + tl.arange(0, LANE))[None, :]
    words = tl.load(at, mask=(rn < N)[:, None] & (k0 < K), other=0).to(tl.int32)
    return words, k0 % S // LANE * BITS


@triton.jit
def project(left, right, total, EXACT: tl.constexpr):
    """total + left @ right in fp32. dW of 16-bit inputs carries an error of 2^-9 or more, to which plain tf32
    (2^-11) adds nothing; EXACT is for fp32 inputs."""
    if EXACT:
        return dot_split(left, right, total)
    else:
        return tl.dot(left, right, total, input_precision="tf32")


@triton.jit
def epilogue(
    dw,
    strip,
    rn,
    row_block,
    codes,
    residual,
    scale0,
    zero0,
    a,
    b,
    scale,
    zero,
    offset,
    gain,
    sum_s,
    sum_t,
    part_a,
    N,
    K,
    codes_row,
    residual_row,
    UNITS_LIVE: tl.constexpr,
    UNITS_WEIGHT: tl.constexpr,
    CLIP_FIRST: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    PROJECT: tl.constexpr,
):
    """dw fp32 [BLOCK_N, 32], zero outside the matrix, of rows rn and channels 32 * strip and up.

    Writes sum_s, sum_t [strips, N] and, with PROJECT, part_a [row blocks, R, K]; returns the masked gradient
    dD [BLOCK_N, 32].
    """
    TOP: tl.constexpr = ((1 << BITS) - 1) * 1.0
    HALF: tl.constexpr = (1 << (BITS - 1)) * 1.0
    k0 = strip * LANE
    kk = k0 + tl.arange(0, LANE)
    live = rn < N
    at = group_row(k0, K, GROUP) * N + rn
    words, shift = plane_words(codes, codes_row, rn, k0, N, K, BITS)
    fraction, shift_f = words, shift
    if RESIDUAL_BITS:
        fraction, shift_f = plane_words(residual, residual_row, rn, k0, N, K, RESIDUAL_BITS)
    code = base_value(words, shift, fraction, shift_f, BITS, RESIDUAL_BITS)
    if zero is None:
        z = tl.full((BLOCK_N, 1), HALF, tl.float32)
    else:
        z = group_values(zero, at, live, 0.0)
    masked = dw
    out = strip.to(tl.int64) * N + rn
    if UNITS_LIVE or R > 0:
        delta = None
        if R > 0:
            delta = low_rank(a, b, gain, rn, kk, N, K, R, BLOCK_R, BLOCK_N, LANE)
        value = grid_value(
            code, delta, scale0, zero0, scale, zero, offset, at, live, UNITS_LIVE, UNITS_WEIGHT, BITS
        )
        # Far values are brought near first: the rounding trick holds below 2^22, and the clip decides the
        # same.
        rounded = round_even(tl.minimum(tl.maximum(value, -1.0), TOP + 1.0))
        if CLIP_FIRST:
            inside = (value >= 0.0) & (value <= TOP)
        else:
            inside = (rounded >= 0.0) & (rounded <= TOP)
        code = tl.minimum(tl.maximum(rounded, 0.0), TOP)
        masked = tl.where(inside, dw, 0.0)
        if UNITS_LIVE:
            # inside q - (v - z) = code - v, formed before the sum: the two sums cancel
            step = tl.where(inside, code - value, code - z)
            tl.store(sum_s + out, tl.sum(dw * step, axis=1), mask=live)
            tl.store(sum_t + out, tl.sum(dw - masked, axis=1), mask=live)
        else:
            factor = group_values(scale, at, live, 0.0)
            if UNITS_WEIGHT:
                factor = tl.div_rn(factor, group_values(scale0, at, live, 1.0))
            masked = masked * factor
    if not UNITS_LIVE:
        tl.store(sum_s + out, tl.sum(dw * (code - z), axis=1), mask=live)
        tl.store(sum_t + out, tl.sum(dw, axis=1), mask=live)
    if R > 0 and PROJECT:
        for r0 in tl.static_range(0, R, BLOCK_R):
            left = rank_rows(b, gain, rn, N, r0, R, BLOCK_R)
            piece = project(tl.trans(left), masked, tl.zeros((BLOCK_R, LANE), tl.float32), EXACT)
            rr = r0 + tl.arange(0, BLOCK_R)
            where = part_a + (row_block.to(tl.int64) * R + rr)[:, None] * K + kk[None, :]
            tl.store(where, piece, mask=(rr < R)[:, None] & (kk < K)[None, :])
    return masked


@triton.jit
def project_b(
    masked, a, kk, K, total, r0: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr
):
    """total + dD A^T over the channels kk, one block of the rank: [BLOCK_N, BLOCK_P]."""
    right = rank_columns(a, kk, K, r0, R, BLOCK_P)
    return project(masked, tl.trans(right), total, EXACT)


@triton.jit
def store_part_b(part_b, piece, slot, rn, r0: tl.constexpr, N, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """part_b [slots, N, R] of one block of the rank."""
    rr = r0 + tl.arange(0, BLOCK_R)
    at = part_b + (slot.to(tl.int64) * N + rn)[:, None] * R + rr[None, :]
    tl.store(at, piece, mask=(rn < N)[:, None] & (rr < R)[None, :])


@triton.jit
def chunked_kernel(
    dw,
    start,
    rows,
    codes,
    residual,
    scale0,
    zero0,
    a,
    b,
    scale,
    zero,
    offset,
    gain,
    sum_s,
    sum_t,
    part_a,
    part_b,
    N,
    K,
    codes_row,
    residual_row,
    UNITS_LIVE: tl.constexpr,
    UNITS_WEIGHT: tl.constexpr,
    CLIP_FIRST: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    EXACT: tl.constexpr,
    PROJECT: tl.constexpr,
):
    """Grid (spans of SPAN strips, row blocks of the chunk). dw [rows, K] is dW of rows start..start+rows-1.
    Without PROJECT the masked gradient dD takes its place, and what is below does not happen.

    dB is summed over a span in registers, which needs the whole rank in two blocks when SPAN > 1.
    """
    span = tl.program_id(0)
    row_block = tl.program_id(1)
    local = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    rn = tl.where(local < rows, start + local, N)  # rows of the next chunk are not ours
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    more = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for i in range(tl.minimum(SPAN, tl.cdiv(K, LANE) - span * SPAN)):
        strip = span * SPAN + i
        kk = strip * LANE + tl.arange(0, LANE)
        mask = (local < rows)[:, None] & (kk < K)[None, :]
        piece = tl.load(dw + local.to(tl.int64)[:, None] * K + kk[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        masked = epilogue(
            piece,
            strip,
            rn,
            row_block,
            codes,
            residual,
            scale0,
            zero0,
            a,
            b,
            scale,
            zero,
            offset,
            gain,
            sum_s,
            sum_t,
            part_a,
            N,
            K,
            codes_row,
            residual_row,
            UNITS_LIVE,
            UNITS_WEIGHT,
            CLIP_FIRST,
            BITS,
            RESIDUAL_BITS,
            GROUP,
            R,
            BLOCK_R,
            BLOCK_P,
            BLOCK_N,
            EXACT,
            PROJECT,
        )
        if R > 0 and not PROJECT:
            tl.store(
                dw + local.to(tl.int64)[:, None] * K + kk[None, :], masked.to(dw.dtype.element_ty), mask=mask
            )
        elif R > 0:
            if SPAN > 1:
                total = project_b(masked, a, kk, K, total, 0, R, BLOCK_P, EXACT)
                if R > BLOCK_P:
                    more = project_b(masked, a, kk, K, more, BLOCK_P, R, BLOCK_P, EXACT)
            else:
                for r0 in tl.static_range(0, R, BLOCK_P):
                    nothing = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
                    part = project_b(masked, a, kk, K, nothing, r0, R, BLOCK_P, EXACT)
                    store_part_b(part_b, part, span, rn, r0, N, R, BLOCK_P)
    if R > 0 and SPAN > 1 and PROJECT:
        store_part_b(part_b, total, span, rn, 0, N, R, BLOCK_P)
        if R > BLOCK_P:
            store_part_b(part_b, more, span, rn, BLOCK_P, N, R, BLOCK_P)


@triton.jit
def strips_of(tile, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile [BLOCK_N, 32, 64 or 128] as a tuple of strips [BLOCK_N, 32], in order. The epilogue works strip
    by strip: a whole tile of every intermediate would not fit in registers."""
    if BLOCK_K == 32:
        return (tile,)
    else:
        low, high = tl.split(tl.permute(tl.reshape(tile, (BLOCK_N, 2, BLOCK_K // 2)), (0, 2, 1)))
        if BLOCK_K == 64:
            return (low, high)
        else:
            low0, low1 = tl.split(tl.permute(tl.reshape(low, (BLOCK_N, 2, 32)), (0, 2, 1)))
            high0, high1 = tl.split(tl.permute(tl.reshape(high, (BLOCK_N, 2, 32)), (0, 2, 1)))
            return (low0, low1, high0, high1)


@triton.jit
def fused_kernel(
    x,
    dy,
    codes,
    residual,
    scale0,
    zero0,
    a,
    b,
    scale,
    zero,
    offset,
    gain,
    sum_s,
    sum_t,
    part_a,
    part_b,
    M,
    N,
    K,
    x_row,
    dy_row,
    codes_row,
    residual_row,
    UNITS_LIVE: tl.constexpr,
    UNITS_WEIGHT: tl.constexpr,
    CLIP_FIRST: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_N: tl.constexpr,
    CT: tl.constexpr,
    PRODUCT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (channel tiles * row blocks). x [M, K], dy [M, N]; each program makes one tile of dW over all of
    M.

    Programs walk GROUP_N row blocks together, so that the tiles of x and dy in flight stay in L2.
    """
    tiles, row_blocks = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (GROUP_N * tiles) * GROUP_N
    height = tl.minimum(row_blocks - band, GROUP_N)
    inside = pid % (GROUP_N * tiles)
    row_block, tile = band + inside % height, inside // height
    rn = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    kk = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    rm = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dy_at = dy + rm.to(tl.int64)[:, None] * dy_row + rn[None, :]
    x_at = x + rm.to(tl.int64)[:, None] * x_row + kk[None, :]
    for m in range(0, M, BLOCK_M):
        there = (m + rm < M)[:, None]
        left = tl.load(dy_at, mask=there & (rn < N)[None, :], other=0.0).to(CT)
        right = tl.load(x_at, mask=there & (kk < K)[None, :], other=0.0).to(CT)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRODUCT)
        dy_at += tl.cast(dy_row, tl.int64) * BLOCK_M
        x_at += tl.cast(x_row, tl.int64) * BLOCK_M
    pieces = strips_of(total, BLOCK_N, BLOCK_K)
    first = tile * (BLOCK_K // LANE)
    sum_b = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    more = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for i in tl.static_range(BLOCK_K // 32):
        strip = first + i
        if strip * LANE < K:
            masked = epilogue(
                pieces[i],
                strip,
                rn,
                row_block,
                codes,
                residual,
                scale0,
                zero0,
                a,
                b,
                scale,
                zero,
                offset,
                gain,
                sum_s,
                sum_t,
                part_a,
                N,
                K,
                codes_row,
                residual_row,
                UNITS_LIVE,
                UNITS_WEIGHT,
                CLIP_FIRST,
                BITS,
                RESIDUAL_BITS,
                GROUP,
                R,
                BLOCK_R,
                BLOCK_P,
                BLOCK_N,
                EXACT,
                True,
            )
            if R > 0:
                columns = strip * LANE + tl.arange(0, LANE)
                sum_b = project_b(masked, a, columns, K, sum_b, 0, R, BLOCK_P, EXACT)
                if R > BLOCK_P:
                    more = project_b(masked, a, columns, K, more, BLOCK_P, R, BLOCK_P, EXACT)
    if R > 0:
        store_part_b(part_b, sum_b, tile, rn, 0, N, R, BLOCK_P)
        if R > BLOCK_P:
            store_part_b(part_b, more, tile, rn, BLOCK_P, N, R, BLOCK_P)


# -------------------------------------------------------------------------------------------------- launchers


def projection_block(rank: int) -> int:
    """Columns of dB summed together in registers."""
    return min(PROJECTION_BLOCK, max(16, triton.next_power_of_2(rank)))


def _by_group(strips: Tensor, per_group: int) -> Tensor:
    """Sums over the strips of a group, in order: [strips, N] -> [G, N]."""
    if per_group == 1:
        return strips
    short = -strips.shape[0] % per_group
    padded = torch.nn.functional.pad(strips, (0, 0, 0, short)) if short else strips
    return padded.view(-1, per_group, strips.shape[1]).sum(1)


def _row_scale_gradients(
    x: Tensor, dy: Tensor, codes: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """dS and dT [1, N] of a frozen grid with one group per row (the identity at the file's head)."""
    # A power of two brings the product, whose codes are integers, into the range of fp16 and is taken back
    # exactly.
    unit = torch.full((1, codes.shape[0]), 0.5**bits, device=x.device)
    product = packed_matmul(x, codes, unit, zero, None, bits, -1)
    ds = torch.linalg.vecdot(dy.t().float(), product.t().float()).mul_(2.0**bits)
    dt = dy.t().float() @ x.float().sum(1)
    return ds.unsqueeze(0), dt.unsqueeze(0)


def grid_gradients(
    x: Tensor,
    dy: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    scale0: Tensor,
    zero0: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    gain: float,
    units: str,
    bits: int,
    residual_bits: int,
    group_size: int,
    clip_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of grid_linear.py: dS, dT [G, N], dA [r, K], dB [N, r], fp32. group_size a multiple of 32 or
    -1.
    """
    (m, k), n = x.shape, codes.shape[0]
    low, live = a is not None and b is not None, units == "live"
    span = plane_group(group_size, k)
    config = dispatch.config("grid_gradients", bits, x.dtype, M=m, N=n, K=k)
    if not low and not live and span == 0:
        ds, dt = _row_scale_gradients(x, dy, codes, zero, bits)
        return ds, dt, *_empty(a, b, x.device)
    rank = a.shape[0] if a is not None and low else 0
    config = gradient_form(config, rank, x.dtype, INTERPRETED)
    exact = x.dtype == torch.float32
    if exact:
        config["BLOCK_N"] = min(config["BLOCK_N"], EXACT_ROWS)
    base = row_dense(codes)
    fraction = row_dense(residual) if residual is not None and residual_bits and (low or live) else None
    state = (
        base,
        fraction,
        dense(scale0),
        dense(zero0) if live else None,
        dense(a) if low else None,
        dense(b) if low else None,
        dense(scale),
        dense(zero),
        dense(offset) if live else None,
        gain,
    )
    strides = (base.stride(0), fraction.stride(0) if fraction is not None else 0)
    static: dict[str, Any] = {
        "UNITS_LIVE": live,
        "UNITS_WEIGHT": units == "weight",
        "CLIP_FIRST": clip_first,
        "BITS": bits,
        "RESIDUAL_BITS": residual_bits if fraction is not None else 0,
        "GROUP": span,
        "R": rank,
        "BLOCK_R": rank_block(rank),
        "BLOCK_P": projection_block(rank),
        "BLOCK_N": config["BLOCK_N"],
        "EXACT": exact,
        **launch_options(config),
        **FP_OPTIONS,
    }
    strips = cdiv(k, 32)
    sums = torch.empty(2, strips, n, dtype=torch.float32, device=x.device)
    run = {"fused": _fused, "blas": _by_blas, "chunked": _chunked}[config["form"]]
    da, db = run(x, dy, state, strides, sums, rank, config, static)
    per_group = strips if span == 0 else span // 32
    ds, dt = _by_group(sums[0], per_group), _by_group(sums[1], per_group)
    if not low:
        return ds, dt, *_empty(a, b, x.device)
    return ds, dt, da, db.mul_(gain)


def _empty(a: Tensor | None, b: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """dA and dB where there is no low-rank part, as the reference shapes them."""
    return (
        torch.zeros(a.shape if a is not None else (0,), dtype=torch.float32, device=device),
        torch.zeros(b.shape if b is not None else (0,), dtype=torch.float32, device=device),
    )


def _fused(x, dy, state, strides, sums, rank, config, static) -> tuple[Tensor, Tensor]:
    (m, k), n = x.shape, dy.shape[1]
    x, dy = row_dense(x), row_dense(dy)
    width = config.get("BLOCK_K", 128)
    tiles, row_blocks = cdiv(k, width), cdiv(n, config["BLOCK_N"])
    part_a = sums.new_empty(row_blocks, rank, k)
    part_b = sums.new_empty(tiles, n, rank)
    launch(
        fused_kernel,
        (tiles * row_blocks,),
        x,
        dy,
        *state,
        sums[0],
        sums[1],
        part_a,
        part_b,
        m,
        n,
        k,
        x.stride(0),
        dy.stride(0),
        *strides,
        BLOCK_K=width,
        BLOCK_M=config["BLOCK_M"],
        GROUP_N=config.get("GROUP_N", 8),
        CT=COMPUTE[compute_dtype(x.dtype)],
        PRODUCT="ieee" if x.dtype == torch.float32 else "tf32",
        **static,
    )
    return part_a.sum(0), part_b.sum(0)


def _chunked(x, dy, state, strides, sums, rank, config, static) -> tuple[Tensor, Tensor]:
    k, n, block = x.shape[1], dy.shape[1], config["BLOCK_N"]
    # Two blocks of the rank fit in registers next to the tile; a larger rank is written strip by strip.
    strips = sums.shape[1]
    rows, span = gradient_chunk(n, k, rank, x.element_size(), config)
    spans = cdiv(strips, span)
    scratch = torch.empty(min(rows, n), k, dtype=x.dtype, device=x.device)
    part_a = sums.new_empty(cdiv(min(rows, n), block), rank, k)
    part_b = sums.new_empty(spans, n, rank)
    da = sums.new_zeros(rank, k)
    for start in range(0, n, rows):
        count = min(rows, n - start)
        dw = torch.mm(dy[:, start : start + count].t(), x, out=scratch[:count])
        blocks = cdiv(count, block)
        launch(
            chunked_kernel,
            (spans, blocks),
            dw,
            start,
            count,
            *state,
            sums[0],
            sums[1],
            part_a,
            part_b,
            n,
            k,
            *strides,
            SPAN=span,
            PROJECT=True,
            **static,
        )
        if rank:
            da += part_a[:blocks].sum(0)
    return da, part_b.sum(0)


def _by_blas(x, dy, state, strides, sums, rank, config, static) -> tuple[Tensor, Tensor]:
    k, n = x.shape[1], dy.shape[1]
    a, b, gain = state[4], state[5], state[9]
    rows, span = gradient_chunk(n, k, rank, x.element_size(), config)
    scratch = torch.empty(min(rows, n), k, dtype=x.dtype, device=x.device)
    left, right = (
        _parts_of(b.float() * gain, x.dtype, 1),
        _parts_of(a.float(), x.dtype, 0),
    )  # [N, p r], [p r, K], p parts
    parts = left.shape[1] // rank
    more = {} if x.dtype == torch.float32 else {"out_dtype": torch.float32}
    da, db = sums.new_zeros(rank, k), sums.new_empty(n, rank)
    for start in range(0, n, rows):
        count = min(rows, n - start)
        dw = torch.mm(dy[:, start : start + count].t(), x, out=scratch[:count])
        launch(
            chunked_kernel,
            (cdiv(sums.shape[1], span), cdiv(count, config["BLOCK_N"])),
            dw,
            start,
            count,
            *state,
            sums[0],
            sums[1],
            dw,
            dw,
            n,
            k,
            *strides,
            SPAN=span,
            PROJECT=False,
            **static,
        )
        da += torch.mm(left[start : start + count].t(), dw, **more).view(parts, rank, k).sum(0)
        torch.sum(torch.mm(dw, right.t(), **more).view(count, parts, rank), 1, out=db[start : start + count])
    return da, db


def _parts_of(factor: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """An fp32 factor as numbers of `dtype` side by side along `dim`, whose sum it is: one of fp32, two of
    16 bits.
    """
    if dtype == torch.float32:
        return factor
    high = factor.to(dtype)
    return torch.cat((high, (factor - high.float()).to(dtype)), dim)


# ----------------------------------------------------------------------------------------------- what we ship


def _case(
    form: str, rank: int, units: str, config: dict, exact: bool = False, only: tuple[int, ...] = ()
) -> tuple:
    live = units == "live"
    rows = min(config["BLOCK_N"], EXACT_ROWS) if exact else config["BLOCK_N"]
    fraction = 4 if rank or live else 0
    pointers = {"codes": "*i16", "scale0": "*bf16", "scale": "*fp32"} | dict.fromkeys(
        ("sum_s", "sum_t", "part_a", "part_b"), "*fp32"
    )
    if fraction:
        pointers["residual"] = "*i16"
    if rank:
        pointers |= {"a": "*fp32", "b": "*fp32"}
    sizes = dict.fromkeys(("N", "K", "codes_row", "residual_row"), "i32")
    absent = {
        name: None for name in ("residual", "zero0", "a", "b", "zero", "offset") if name not in pointers
    }
    constants = absent | {
        "UNITS_LIVE": live,
        "UNITS_WEIGHT": units == "weight",
        "CLIP_FIRST": live,
        "BITS": 4,
        "RESIDUAL_BITS": fraction,
        "GROUP": 128,
        "R": rank,
        "BLOCK_R": rank_block(rank),
        "BLOCK_P": projection_block(rank),
        "BLOCK_N": rows,
        "EXACT": exact,
    }
    if form == "fused":
        pointers |= {"x": "*bf16", "dy": "*bf16"}
        sizes |= dict.fromkeys(("M", "x_row", "dy_row"), "i32")
        constants |= {"BLOCK_K": 128, "BLOCK_M": 64, "GROUP_N": 8, "CT": tl.bfloat16, "PRODUCT": "tf32"}
    else:
        pointers["dw"] = "*fp32" if exact else "*bf16"
        sizes |= dict.fromkeys(("start", "rows"), "i32")
        constants["SPAN"] = config.get("SPAN", 32 if rank <= 2 * PROJECTION_BLOCK else 1)
        constants["PROJECT"] = form == "chunked"
    options = {**launch_options(config), **FP_OPTIONS}
    kernel = fused_kernel if form == "fused" else chunked_kernel
    # The hot loop of the fused form is over M: its instructions are per element of dW and step, not per
    # weight.
    weights = None if form == "fused" else rows * 32
    case = (
        f"gradients-{form}-r{rank}-{units}{'-fp32' if exact else ''}",
        kernel,
        pointers | sizes | {"gain": "fp32"},
        constants,
        options,
        weights,
    )
    return (*case, only) if only else case


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles: the forms as the table has them, and the others at the tiles a tuner
    starts from.
    """
    table, hopper = (
        dispatch.packaged("grid_gradients", 4, torch.bfloat16, 4096, 4096, 4096, arch) for arch in (80, 90)
    )
    assert table["form"] == "chunked" and hopper["form"] == "fused"
    wide = {"BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    blas = {"BLOCK_N": 64, "SPAN": 4, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    return [
        *(_case("chunked", rank, "grid", table) for rank in (0, 16, 64, 128)),
        *(_case("chunked", rank, "live", table) for rank in (0, 64)),
        _case("chunked", 32, "weight", table),
        _case("chunked", 64, "grid", table, exact=True),
        *(
            _case("fused", rank, units, hopper, only=(90,))
            for rank in (0, 16, 64)
            for units in ("grid", "live")
        ),
        # what takes the place of the fused form: of fp32 inputs, and of a rank too large to be summed on chip
        _case("chunked", 128, "weight", CHUNKED, only=(90,)),
        _case("chunked", 16, "grid", CHUNKED, exact=True, only=(90,)),
        *(_case("blas", rank, "grid", blas, only=(80, 90)) for rank in (16, 64, 128)),
        _case("blas", 64, "grid", blas, exact=True, only=(80, 90)),
        _case("fused", 0, "grid", wide, only=(80,)),
        # on sm_8x rank 64 fits only with half the rows
        _case("fused", 64, "live", {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, only=(80,)),
    ]
