"""Sign planes on a GPU: y = x W^T, dX and the gradients of the plane scales, W = sum_k alpha_k b_k + offset.

One half-word holds the signs of 16 runs of 32 channels (layout.py). Turning a bit into +-1.0 is a shift and
one logic operation on two numbers at a time, so a plane costs about 1.2 instructions per weight; alpha_k
never touches a weight where it can meet the sum over a group instead. Regimes, chosen by configs.json:

    decode      M <= 16. Operand +-1, exact; one accumulator per plane, scaled by alpha_k in fp32 when a group
                ends. K is split over programs and the last to arrive adds the parts in order. The offset
                meets the group sums of x.
    fused       mid M. Operand sum_k alpha_k b_k + offset in 16 bits, rounded after every plane: 1.5
                instructions per plane and weight instead of the 3 of an fp32 sum, and the scales lose
                nothing, since this regime takes only 16-bit ones.
    two_stage   large M, and every dX: the weight is written chunk by chunk into a scratch, and cuBLAS
                multiplies it. dX takes chunks of channels, so that its sums over N are never cut.

The gradients are sums of dW = dY^T X over groups, weighted with +-1. Either cuBLAS makes dW chunk by chunk
(chunked), or the tile of dW never leaves the chip and its epilogue sums it (fused; groups of 32, 64, 128).
Both write each result once, no atomics: the same bits in every run.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .launch import cdiv, launch
from .layout import CODES_PER_HALFWORD, LANES, group_count, superblock
from .scratch import binary_rows as _step
from .triton_common import (
    COMPUTE,
    LANE,
    add_in_order,
    compute_dtype,
    counters,
    fma16,
    launch_options,
    mul16,
    plane_group,
    rows_of,
    signs,
    use_asm,
)

_FIELDS = CODES_PER_HALFWORD[1]
FIELDS = tl.constexpr(_FIELDS)  # sign fields per half-word
BLOCK = tl.constexpr(superblock(1))  # channels per superblock


@triton.constexpr_function
def _run(group):
    """Fields in a row that always share a group."""
    return _FIELDS if int(group) == 0 else math.gcd(_FIELDS, int(group) // LANES)


@triton.jit
def _words(planes, rows, block, N, stride, Q: tl.constexpr):
    """The half-words [rows, 32] of superblock `block`, one tile per plane."""
    lane = tl.arange(0, LANE)
    words = ()
    for k in tl.static_range(Q):
        words = words + (
            tl.load(
                planes + (rows + k * tl.cast(N, tl.int64))[:, None] * stride + block * LANE + lane[None, :]
            ),
        )
    return words


@triton.jit
def _alphas(alpha, group, rows, N, groups, Q: tl.constexpr):
    """alpha_k of one group, fp32 [rows], one vector per plane."""
    values = ()
    for k in tl.static_range(Q):
        at = tl.cast(k * groups + group, tl.int64) * N + rows
        values = values + (tl.load(alpha + at).to(tl.float32),)
    return values


@triton.jit
def _signed(word, value, FIELD: tl.constexpr):
    """+-value in fp32 by the sign field of `word`: bit 1 is +."""
    bit = (word.to(tl.int32) << (31 - FIELD)) & (-2147483648)
    return ((-value).to(tl.int32, bitcast=True)[:, None] ^ bit).to(tl.float32, bitcast=True)


@triton.jit
def _weight(words, alphas, offset, FIELD: tl.constexpr, Q: tl.constexpr, OFFSET: tl.constexpr):
    """sum_k alpha_k b_k (+ offset) of one field, fp32 [rows, 32], planes added in order."""
    weight = _signed(words[0], alphas[0], FIELD)
    for k in tl.static_range(1, Q):
        weight += _signed(words[k], alphas[k], FIELD)
    if OFFSET:
        weight += offset[:, None]
    return weight


@triton.jit
def _packed_weight(
    words, alphas, offset, FIELD: tl.constexpr, Q: tl.constexpr, OFFSET: tl.constexpr, CT: tl.constexpr
):
    """The same in 16 bits, two numbers per instruction, rounded after every plane; for scales that are 16
    bits themselves.
    """
    first = signs(words[0], FIELD, CT, True)
    if OFFSET:
        weight = fma16(first, alphas[0].to(CT)[:, None], offset.to(CT)[:, None], CT, True)
    else:
        weight = mul16(first, alphas[0].to(CT)[:, None], CT, True)
    for k in tl.static_range(1, Q):
        weight = fma16(signs(words[k], FIELD, CT, True), alphas[k].to(CT)[:, None], weight, CT, True)
    return weight


@triton.jit
def _x(xp, in_m, block, K, FIELD: tl.constexpr, TAIL: tl.constexpr, CT: tl.constexpr):
    """x^T of one field, [32, BLOCK_M]; zeros beyond M and K, whatever lies there."""
    lane = tl.arange(0, LANE)
    mask = in_m[None, :]
    if TAIL:
        mask = mask & (block * BLOCK + FIELD * LANE + lane < K)[:, None]
    return tl.load(xp + FIELD * LANE, mask=mask, other=0.0).to(CT)


@triton.jit
def _decode_block(
    accs,
    words,
    alpha,
    xp,
    block,
    rows,
    in_m,
    N,
    K,
    groups,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    TAIL: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One superblock of the decode regime. accs: the scaled sum, or with one group per row the bare sum of
    each plane.
    """
    for run in tl.static_range(FIELDS // RUN):
        parts = ()
        for k in tl.static_range(Q):
            if GROUP == 0:
                parts = parts + (accs[k],)
            else:
                parts = parts + (tl.zeros_like(accs[0]),)
        for i in tl.static_range(RUN):
            x = _x(xp, in_m, block, K, run * RUN + i, TAIL, CT)
            sums = ()
            for k in tl.static_range(Q):
                w = signs(words[k], run * RUN + i, CT, ASM)
                sums = sums + (tl.dot(w, x, parts[k], input_precision="ieee"),)
            parts = sums
        if GROUP == 0:
            accs = parts
        else:
            # Beyond K the parts are zero, and any alpha will do: the last one exists.
            group = tl.minimum((block * FIELDS + run * RUN) // (GROUP // LANE), groups - 1)
            alphas = _alphas(alpha, group, rows, N, groups, Q)
            total = accs[0]
            for k in tl.static_range(Q):
                total += parts[k] * alphas[k][:, None]
            accs = (total,)
    return accs


@triton.jit(do_not_specialize=["M", "groups", "per_part"])
def decode_kernel(
    x,
    planes,
    alpha,
    offset,
    xsum,
    y,
    work,
    arrived,
    M,
    N,
    K,
    stride_x,
    stride_w,
    groups,
    per_part,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y [M, N] for M <= BLOCK_M. grid (N / BLOCK_N, PARTS); a part is per_part superblocks of K. xsum [G,
    M].
    """
    RUN: tl.constexpr = _run(GROUP)
    tile, part = tl.program_id(0), tl.program_id(1)
    rm = tl.arange(0, BLOCK_M).to(tl.int64)
    rn = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rm < M, rn < N
    # Rows beyond N read the last row: no mask in the loop, and what they give is never stored.
    rows = tl.minimum(rn, N - 1).to(tl.int64)
    first = part * per_part
    stop = tl.minimum(first + per_part, tl.cdiv(K, BLOCK))
    whole = tl.minimum(stop, K // BLOCK)
    xp = x + rm[None, :] * stride_x + first * BLOCK + tl.arange(0, LANE)[:, None]
    accs = (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    if GROUP == 0:
        for _ in tl.static_range(1, Q):
            accs = accs + (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    for block in range(first, whole):
        words = _words(planes, rows, block, N, stride_w, Q)
        accs = _decode_block(
            accs, words, alpha, xp, block, rows, in_m, N, K, groups, Q, GROUP, RUN, False, CT, ASM
        )
        xp += BLOCK
    if not EVEN_K:
        if whole < stop:
            words = _words(planes, rows, whole, N, stride_w, Q)
            accs = _decode_block(
                accs, words, alpha, xp, whole, rows, in_m, N, K, groups, Q, GROUP, RUN, True, CT, ASM
            )
    acc = accs[0]
    if GROUP == 0:
        alphas = _alphas(alpha, 0, rows, N, groups, Q)
        acc = acc * alphas[0][:, None]
        for k in tl.static_range(1, Q):
            acc += accs[k] * alphas[k][:, None]
    if OFFSET:
        if part == 0:
            for group in range(groups):
                t = tl.load(offset + tl.cast(group, tl.int64) * N + rows).to(tl.float32)
                acc += t[:, None] * tl.load(xsum + rm + group * M, mask=in_m, other=0.0)[None, :]
    mask = in_n[:, None] & in_m[None, :]
    out = rm[None, :] * N + rn[:, None]
    if PARTS == 1:
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)
    else:
        total, last = add_in_order(acc, out, mask, work, arrived, tile, tl.cast(M, tl.int64) * N, PARTS, part)
        tl.store(y + out, total.to(y.dtype.element_ty), mask=mask & last)


@triton.jit
def _fused_block(
    acc,
    words,
    alpha,
    offset,
    xp,
    block,
    rows,
    in_m,
    N,
    K,
    groups,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    OFFSET: tl.constexpr,
    TAIL: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_M] += one superblock of the weight times x^T."""
    for run in tl.static_range(FIELDS // RUN):
        group = 0
        if GROUP != 0:
            group = tl.minimum((block * FIELDS + run * RUN) // (GROUP // LANE), groups - 1)
        alphas = _alphas(alpha, group, rows, N, groups, Q)
        t = alphas[0]
        if OFFSET:
            t = tl.load(offset + tl.cast(group, tl.int64) * N + rows).to(tl.float32)
        for i in tl.static_range(RUN):
            x = _x(xp, in_m, block, K, run * RUN + i, TAIL, CT)
            if ASM:
                w = _packed_weight(words, alphas, t, run * RUN + i, Q, OFFSET, CT)
            else:
                w = _weight(words, alphas, t, run * RUN + i, Q, OFFSET).to(CT)
            acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def fused_kernel(
    x,
    planes,
    alpha,
    offset,
    y,
    M,
    N,
    K,
    stride_x,
    stride_w,
    groups,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] tile of y^T. grid (M tiles * N tiles), M fastest: neighbours share the
    planes' rows.
    """
    RUN: tl.constexpr = _run(GROUP)
    tiles_m = tl.cdiv(M, BLOCK_M)
    rm = (tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rn = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rm < M, rn < N
    rows = tl.minimum(rn, N - 1).to(tl.int64)
    xp = x + rm[None, :] * stride_x + tl.arange(0, LANE)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(0, K // BLOCK):
        words = _words(planes, rows, block, N, stride_w, Q)
        acc = _fused_block(
            acc,
            words,
            alpha,
            offset,
            xp,
            block,
            rows,
            in_m,
            N,
            K,
            groups,
            Q,
            GROUP,
            RUN,
            OFFSET,
            False,
            CT,
            ASM,
        )
        xp += BLOCK
    if not EVEN_K:
        last = K // BLOCK
        words = _words(planes, rows, last, N, stride_w, Q)
        acc = _fused_block(
            acc,
            words,
            alpha,
            offset,
            xp,
            last,
            rows,
            in_m,
            N,
            K,
            groups,
            Q,
            GROUP,
            RUN,
            OFFSET,
            True,
            CT,
            ASM,
        )
    tl.store(
        y + rm[None, :] * N + rn[:, None], acc.to(y.dtype.element_ty), mask=in_n[:, None] & in_m[None, :]
    )


@triton.jit
def dequantize_kernel(
    planes,
    alpha,
    offset,
    out,
    first_row,
    stop_row,
    first_block,
    N,
    K,
    stride_w,
    stride_out,
    groups,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows first_row..stop_row of W from superblock first_block on, one superblock per program of grid (row
    tiles, blocks), into out, whose [0, 0] is the weight's [first_row, first_block * 512]."""
    RUN: tl.constexpr = _run(GROUP)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = first_row + rn < stop_row
    rows = tl.minimum(first_row + rn, stop_row - 1).to(tl.int64)
    block = first_block + tl.program_id(1)
    lane = tl.arange(0, LANE)
    words = _words(planes, rows, block, N, stride_w, Q)
    target = out + rn.to(tl.int64)[:, None] * stride_out + tl.program_id(1) * BLOCK + lane[None, :]
    for run in tl.static_range(FIELDS // RUN):
        group = 0
        if GROUP != 0:
            group = tl.minimum((block * FIELDS + run * RUN) // (GROUP // LANE), groups - 1)
        alphas = _alphas(alpha, group, rows, N, groups, Q)
        t = alphas[0]
        if OFFSET:
            t = tl.load(offset + tl.cast(group, tl.int64) * N + rows).to(tl.float32)
        for i in tl.static_range(RUN):
            channel = (run * RUN + i) * LANE
            weight = _weight(words, alphas, t, run * RUN + i, Q, OFFSET)
            mask = in_n[:, None] & (block * BLOCK + channel + lane < K)[None, :]
            tl.store(target + channel, weight.to(out.dtype.element_ty), mask=mask)


@triton.jit
def group_sums_kernel(
    dw,
    planes,
    da,
    dt,
    first_row,
    stop_row,
    N,
    K,
    stride_dw,
    stride_w,
    groups,
    per_group,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """da [Q, G, N] and dt [G, N] of rows first_row.., from dw [rows, K]. grid (row tiles, G); a group is
    per_group runs of 32 channels."""
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    in_n = first_row + rn < stop_row
    rows = tl.minimum(first_row + rn, stop_row - 1).to(tl.int64)
    lane = tl.arange(0, LANE)
    total = tl.zeros((BLOCK_N, LANE), tl.float32)
    accs = ()
    for _ in tl.static_range(Q):
        accs = accs + (tl.zeros((BLOCK_N, LANE), tl.float32),)
    first = group * per_group
    for step in range(tl.minimum(per_group, tl.cdiv(K, LANE) - first)):
        plane = first + step
        inside = in_n[:, None] & (lane + plane * LANE < K)[None, :]
        at = rn.to(tl.int64)[:, None] * stride_dw + (lane + plane * LANE)[None, :]
        value = tl.load(dw + at, mask=inside, other=0.0).to(tl.float32)
        total += value
        word_at = (lane + plane // FIELDS * LANE)[None, :]
        sums = ()
        for k in tl.static_range(Q):
            word = tl.load(planes + (rows + k * tl.cast(N, tl.int64))[:, None] * stride_w + word_at).to(
                tl.int32
            )
            bit = (word >> (plane % FIELDS)) & 1
            sums = sums + (accs[k] + tl.where(bit == 1, value, -value),)
        accs = sums
    for k in tl.static_range(Q):
        tl.store(
            da + tl.cast(k * groups + group, tl.int64) * N + first_row + rn, tl.sum(accs[k], 1), mask=in_n
        )
    tl.store(dt + group.to(tl.int64) * N + first_row + rn, tl.sum(total, 1), mask=in_n)


@triton.jit
def gradients_kernel(
    x,
    dy,
    planes,
    da,
    dt,
    M,
    N,
    K,
    stride_x,
    stride_y,
    stride_w,
    groups,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    CT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """da and dt from a tile [BLOCK_N, BLOCK_K] of dY^T X that is summed where it was computed; GROUP
    divides BLOCK_K.
    """
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n, in_k = rn < N, rk < K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        rm = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_m = rm < M
        g = tl.load(
            dy + rm[:, None] * stride_y + rn[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0
        ).to(CT)
        v = tl.load(
            x + rm[:, None] * stride_x + rk[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0
        ).to(CT)
        acc = tl.dot(tl.trans(g), v, acc, input_precision="ieee")
    rows = tl.minimum(rn, N - 1).to(tl.int64)
    group = tl.program_id(1) * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    to = group.to(tl.int64)[None, :] * N + rn[:, None]
    mask = in_n[:, None] & (group < groups)[None, :]
    word_at = (rk // BLOCK) * LANE + rk % LANE
    shift = rk % BLOCK // LANE
    for k in tl.static_range(Q):
        word = tl.load(
            planes + (rows + k * tl.cast(N, tl.int64))[:, None] * stride_w + word_at[None, :],
            mask=in_k[None, :],
            other=0,
        )
        signed = tl.where((word.to(tl.int32) >> shift[None, :]) & 1 == 1, acc, -acc)
        sums = tl.sum(tl.reshape(signed, (BLOCK_N, BLOCK_K // GROUP, GROUP)), 2)
        tl.store(da + tl.cast(k, tl.int64) * groups * N + to, sums, mask=mask)
    tl.store(dt + to, tl.sum(tl.reshape(acc, (BLOCK_N, BLOCK_K // GROUP, GROUP)), 2), mask=mask)


# ------------------------------------------------------------------------------------------------ launchers


def _dequantize(
    out: Tensor,
    planes: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    k: int,
    group_size: int,
    rows: slice,
    block: int,
    warps: dict,
) -> None:
    """W[rows, block * 512 : ...] into out [n, channels]."""
    (q, n, width), tile = planes.shape, warps["BLOCK_N"]
    blocks = cdiv(out.shape[1], superblock(1))
    launch(
        dequantize_kernel,
        (cdiv(rows.stop - rows.start, tile), blocks),
        planes,
        alpha,
        alpha if offset is None else offset,
        out,
        rows.start,
        rows.stop,
        block,
        n,
        k,
        width,
        out.stride(0),
        alpha.shape[1],
        Q=q,
        GROUP=plane_group(group_size, k),
        OFFSET=offset is not None,
        **warps,
    )


def _tile(dtype: torch.dtype, m: int, n: int, k: int) -> dict:
    return dispatch.config("binary_dequantize", 1, dtype, m, n, k)


def binary_dequantize(
    planes: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [N, K] in dtype."""
    planes, alpha, offset = _contiguous(planes, alpha, offset)
    n = planes.shape[1]
    out = planes.new_empty(n, in_features, dtype=dtype)
    _dequantize(
        out, planes, alpha, offset, in_features, group_size, slice(0, n), 0, _tile(dtype, n, n, in_features)
    )
    return out


def _contiguous(planes: Tensor, alpha: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return planes.contiguous(), alpha.contiguous(), None if offset is None else offset.contiguous()


def _group_sums_of_x(x: Tensor, group_size: int) -> Tensor:
    """[M, K] -> fp32 [G, M]: sums over each group."""
    m, k = x.shape
    if group_size == -1 or group_size >= k:
        return x.sum(1, dtype=torch.float32)[None]
    padded = torch.nn.functional.pad(x, (0, -k % group_size))
    return padded.view(m, -1, group_size).sum(2, dtype=torch.float32).t().contiguous()


def binary_matmul(x: Tensor, planes: Tensor, alpha: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype, planes int16 [q, N, W], alpha [q, G, N], offset [G, N] or None."""
    flat = rows_of(x)
    planes, alpha, offset = _contiguous(planes, alpha, offset)
    (m, k), (q, n, width) = flat.shape, planes.shape
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y.view(*x.shape[:-1], n)
    settings = dispatch.config("binary_matmul", q, x.dtype, m, n, k)
    regime = settings.pop("regime")
    given = alpha if offset is None else offset
    shared = {
        "Q": q,
        "GROUP": plane_group(group_size, k),
        "OFFSET": offset is not None,
        "EVEN_K": k % superblock(1) == 0,
        "CT": COMPUTE[compute_dtype(x.dtype)],
    }
    if regime == "decode" and m <= settings["BLOCK_M"]:
        tiles, blocks = cdiv(n, settings["BLOCK_N"]), cdiv(k, superblock(1))
        waves = settings.pop("WAVES", 2.0)
        parts = min(blocks, settings.pop("SPLIT_K") or dispatch.split_k(tiles, blocks, waves=waves))
        per_part = cdiv(blocks, parts)
        parts = cdiv(blocks, per_part)
        work = y if parts == 1 else x.new_empty(parts, m, n, dtype=torch.float32)
        arrived = y if parts == 1 else counters(tiles, x.device)
        xsum = alpha if offset is None else _group_sums_of_x(flat, group_size)
        launch(
            decode_kernel,
            (tiles, parts),
            flat,
            planes,
            alpha,
            given,
            xsum,
            y,
            work,
            arrived,
            m,
            n,
            k,
            flat.stride(0),
            width,
            alpha.shape[1],
            per_part,
            ASM=use_asm(x.dtype),
            PARTS=parts,
            **shared,
            **settings,
        )
    elif regime == "fused" and (not use_asm(x.dtype) or alpha.element_size() == 2):
        grid = (cdiv(m, settings["BLOCK_M"]) * cdiv(n, settings["BLOCK_N"]),)
        launch(
            fused_kernel,
            grid,
            flat,
            planes,
            alpha,
            given,
            y,
            m,
            n,
            k,
            flat.stride(0),
            width,
            alpha.shape[1],
            ASM=use_asm(x.dtype),
            **shared,
            **settings,
        )
    else:
        step = min(n, _step(settings.get("CHUNK_MB", 24), k, x.element_size(), 128))
        scratch, tile = x.new_empty(step, k), _tile(x.dtype, m, n, k)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            weight = scratch[: rows.stop - start]
            _dequantize(weight, planes, alpha, offset, k, group_size, rows, 0, tile)
            torch.mm(flat, weight.t(), out=y[:, rows])
    return y.view(*x.shape[:-1], n)


def binary_matmul_dx(
    dy: Tensor, planes: Tensor, alpha: Tensor, offset: Tensor | None, in_features: int, group_size: int
) -> Tensor:
    """dX = dY W, [..., N] -> [..., K] in dy's dtype."""
    flat = rows_of(dy)
    planes, alpha, offset = _contiguous(planes, alpha, offset)
    m, n = flat.shape
    if m == 0 or n == 0:
        return dy.new_zeros(*dy.shape[:-1], in_features)
    dx = dy.new_empty(m, in_features)
    settings, block = (
        dispatch.config("binary_matmul_dx", planes.shape[0], dy.dtype, m, n, in_features),
        superblock(1),
    )
    step = min(in_features, _step(settings["CHUNK_MB"], n, dy.element_size(), block))
    scratch, tile = dy.new_empty(n * step), _tile(dy.dtype, m, n, in_features)
    for start in range(0, in_features, step):
        channels = min(step, in_features - start)
        weight = scratch[: n * channels].view(n, channels)
        _dequantize(weight, planes, alpha, offset, in_features, group_size, slice(0, n), start // block, tile)
        torch.mm(flat, weight, out=dx[:, start : start + channels])
    return dx.view(*dy.shape[:-1], in_features)


def binary_gradients(
    x: Tensor, dy: Tensor, planes: Tensor, group_size: int, trained: int
) -> tuple[Tensor, Tensor]:
    """dalpha [trained, G, N] of the first planes and doffset [G, N], fp32, from x [M, K] and dy [M, N]."""
    x, dy, planes = rows_of(x), rows_of(dy), planes.contiguous()
    (m, k), (_, n, width) = x.shape, planes.shape
    groups, group = group_count(k, group_size), plane_group(group_size, k)
    da = x.new_empty(trained, groups, n, dtype=torch.float32)
    dt = x.new_empty(groups, n, dtype=torch.float32)
    settings = dispatch.config("binary_gradients", planes.shape[0], x.dtype, m, n, k)
    form, chunk = settings.pop("form"), settings.pop("CHUNK_MB", 24)
    if form == "fused" and group and settings["BLOCK_K"] % group == 0:
        launch(
            gradients_kernel,
            (cdiv(n, settings["BLOCK_N"]), cdiv(k, settings["BLOCK_K"])),
            x,
            dy,
            planes,
            da,
            dt,
            m,
            n,
            k,
            x.stride(0),
            dy.stride(0),
            width,
            groups,
            Q=trained,
            GROUP=group,
            CT=COMPUTE[compute_dtype(x.dtype)],
            **settings,
        )
        return da, dt
    tile = _tile(x.dtype, m, n, k)
    step = min(n, _step(chunk, k, x.element_size(), 128))
    scratch = x.new_empty(step, k)
    per_group = (group or k + -k % LANES) // LANES
    for start in range(0, n, step):
        stop = min(start + step, n)
        dw = scratch[: stop - start]
        torch.mm(dy[:, start:stop].t(), x, out=dw)
        launch(
            group_sums_kernel,
            (cdiv(stop - start, tile["BLOCK_N"]), groups),
            dw,
            planes,
            da,
            dt,
            start,
            stop,
            n,
            k,
            k,
            width,
            groups,
            per_group,
            Q=trained,
            **tile,
        )
    return da, dt


# ----------------------------------------------------------------------------------------------- what we ship


_SIZES = dict.fromkeys(("M", "N", "K", "stride_x", "stride_w", "groups"), "i32")
_VALUES = {"planes": "*i16", "alpha": "*bf16", "offset": "*bf16"}
_GATED = (80, 86, 89, 90, 120)


def _matmul_case(dtype: str, q: int, group: int, m: int, arch: int) -> tuple:
    """decode_kernel or fused_kernel, whichever the table has for this M."""
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    config = dispatch.packaged("binary_matmul", q, torch_dtype, m, 4096, 4096, arch)
    regime, rows, columns = config["regime"], config["BLOCK_M"], config["BLOCK_N"]
    signature = {"x": "*" + dtype, **_VALUES, "y": "*" + dtype, **_SIZES}
    constants = {
        "Q": q,
        "GROUP": group,
        "OFFSET": regime == "fused",
        "EVEN_K": True,
        "CT": tl.bfloat16 if dtype == "bf16" else tl.float16,
        "ASM": True,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
    }
    if regime == "decode":
        signature |= {"xsum": "*fp32", "work": "*fp32", "arrived": "*i32", "per_part": "i32"}
        constants["PARTS"] = 4
    name = f"binary-{regime}-q{q}-g{group}-m{rows}-n{columns}-{dtype}"
    kernel = decode_kernel if regime == "decode" else fused_kernel
    return name, kernel, signature, constants, launch_options(config), columns * superblock(1), (arch,)


def _gradient_case(q: int, arch: int) -> tuple:
    config = dispatch.packaged("binary_gradients", q, torch.bfloat16, 4096, 4096, 4096, arch)
    signature = {
        "x": "*bf16",
        "dy": "*bf16",
        "planes": "*i16",
        "da": "*fp32",
        "dt": "*fp32",
        **_SIZES,
        "stride_y": "i32",
    }
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants = {"Q": q, "GROUP": 128, "CT": tl.bfloat16, **tile}
    name = f"binary-gradients-q{q}-m{tile['BLOCK_M']}-bf16"
    return name, gradients_kernel, signature, constants, launch_options(config), None, (arch,)


def _chunk_cases() -> list[tuple]:
    config = dispatch.packaged("binary_dequantize", 1, torch.bfloat16, 4096, 4096, 4096, 80)
    rows = {"first_row": "i32", "stop_row": "i32", "N": "i32", "K": "i32", "stride_w": "i32", "groups": "i32"}
    written = {**_VALUES, "out": "*bf16", "first_block": "i32", "stride_out": "i32", **rows}
    summed = {
        "dw": "*bf16",
        "planes": "*i16",
        "da": "*fp32",
        "dt": "*fp32",
        "stride_dw": "i32",
        "per_group": "i32",
        **rows,
    }
    tile, options = {"Q": 3, "BLOCK_N": config["BLOCK_N"]}, launch_options(config)
    return [
        (
            "binary-dequantize-q3-bf16",
            dequantize_kernel,
            written,
            {**tile, "GROUP": 128, "OFFSET": True},
            options,
            None,
        ),
        ("binary-group-sums-q3-bf16", group_sums_kernel, summed, tile, options, None),
    ]


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles: the table's entries for each number of planes, once per architecture."""
    cases = [
        _matmul_case("bf16", q, 128, m, arch) for arch in _GATED for q in (1, 2, 3, 4) for m in (1, 16, 64)
    ]
    cases += [_matmul_case("bf16", 3, 0, 1, arch) for arch in _GATED] + [
        _matmul_case("fp16", 3, 128, 1, arch) for arch in _GATED
    ]
    cases += [
        _gradient_case(3, arch) for arch in _GATED if arch != 90
    ]  # there the table takes the chunked form
    return cases + _chunk_cases()
