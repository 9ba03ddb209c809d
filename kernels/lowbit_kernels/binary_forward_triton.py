"""y = x W^T from sign planes on chip: the decode and the fused regime (binary_triton.py)."""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .binary_weight_triton import (
    BLOCK,
    FIELDS,
    alphas_of,
    packed_weight_of,
    run_of,
    weight_of,
    words_of,
    x_of,
)
from .triton_common import LANE, signs, store_parts


@triton.jit
def _decode_block(
    accs, words, alpha, xp, block, rows, in_m, N, K, groups,
    Q: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, TAIL: tl.constexpr, CT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
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
            x = x_of(xp, in_m, block, K, run * RUN + i, TAIL, CT)
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
            alphas = alphas_of(alpha, group, rows, N, groups, Q)
            total = accs[0]
            for k in tl.static_range(Q):
                total += parts[k] * alphas[k][:, None]
            accs = (total,)
    return accs


@triton.jit(do_not_specialize=["M", "groups", "per_part"])
def decode_kernel(
    x, planes, alpha, offset, xsum, y, work, arrived, M, N, K, stride_x, stride_w, groups, per_part,
    Q: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, EVEN_K: tl.constexpr, CT: tl.constexpr,
    ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y [M, N] for M <= BLOCK_M. grid (N / BLOCK_N, PARTS); a part is per_part superblocks of K. xsum [G,
    M].
    """
    RUN: tl.constexpr = run_of(GROUP)
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
        words = words_of(planes, rows, block, N, stride_w, Q)
        accs = _decode_block(
            accs, words, alpha, xp, block, rows, in_m, N, K, groups, Q, GROUP, RUN, False, CT, ASM
        )
        xp += BLOCK
    if not EVEN_K:
        if whole < stop:
            words = words_of(planes, rows, whole, N, stride_w, Q)
            accs = _decode_block(
                accs, words, alpha, xp, whole, rows, in_m, N, K, groups, Q, GROUP, RUN, True, CT, ASM
            )
    acc = accs[0]
    if GROUP == 0:
        alphas = alphas_of(alpha, 0, rows, N, groups, Q)
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
    store_parts(y, acc, out, mask, work, arrived, tile, tl.cast(M, tl.int64) * N, PARTS, part)


@triton.jit
def _fused_block(
    acc, words, alpha, offset, xp, block, rows, in_m, N, K, groups,
    Q: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, OFFSET: tl.constexpr, TAIL: tl.constexpr,
    CT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] += one superblock of the weight times x^T."""
    for run in tl.static_range(FIELDS // RUN):
        group = 0
        if GROUP != 0:
            group = tl.minimum((block * FIELDS + run * RUN) // (GROUP // LANE), groups - 1)
        alphas = alphas_of(alpha, group, rows, N, groups, Q)
        t = alphas[0]
        if OFFSET:
            t = tl.load(offset + tl.cast(group, tl.int64) * N + rows).to(tl.float32)
        for i in tl.static_range(RUN):
            x = x_of(xp, in_m, block, K, run * RUN + i, TAIL, CT)
            if ASM:
                w = packed_weight_of(words, alphas, t, run * RUN + i, Q, OFFSET, CT)
            else:
                w = weight_of(words, alphas, t, run * RUN + i, Q, OFFSET).to(CT)
            acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def fused_kernel(
    x, planes, alpha, offset, y, M, N, K, stride_x, stride_w, groups,
    Q: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, EVEN_K: tl.constexpr, CT: tl.constexpr,
    ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T. grid (M tiles * N tiles), M fastest: neighbours share the
    planes' rows.
    """
    RUN: tl.constexpr = run_of(GROUP)
    tiles_m = tl.cdiv(M, BLOCK_M)
    rm = (tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rn = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rm < M, rn < N
    rows = tl.minimum(rn, N - 1).to(tl.int64)
    xp = x + rm[None, :] * stride_x + tl.arange(0, LANE)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(0, K // BLOCK):
        words = words_of(planes, rows, block, N, stride_w, Q)
        acc = _fused_block(
            acc, words, alpha, offset, xp, block, rows, in_m, N, K, groups,
            Q, GROUP, RUN, OFFSET, False, CT, ASM,
        )  # fmt: skip
        xp += BLOCK
    if not EVEN_K:
        last = K // BLOCK
        words = words_of(planes, rows, last, N, stride_w, Q)
        acc = _fused_block(
            acc, words, alpha, offset, xp, last, rows, in_m, N, K, groups,
            Q, GROUP, RUN, OFFSET, True, CT, ASM,
        )  # fmt: skip
    tl.store(
        y + rm[None, :] * N + rn[:, None], acc.to(y.dtype.element_ty), mask=in_n[:, None] & in_m[None, :]
    )
