"""packed_matmul, its input gradient and dequantize on a GPU, all from the one packed buffer.

Both products are computed transposed, with the weight as the first operand of the tensor core: a plane of 32
channels of BLOCK_N rows is one [BLOCK_N, 32] operand, unpacked in registers (triton_common.py), for y^T = W
x^T; and W^T takes its place for dX^T = W^T dY^T. Three regimes, chosen by the table in configs.json and never
by a search at run time:

    decode      M <= 16. The operand is the integer code - zero, exact in 16 bits; the scale multiplies the
                fp32 accumulator once per group. K is split over programs; the last to arrive adds the parts
                in order: one launch, and the same bits in every run.
    fused       mid M. The operand is the weight itself, rounded to the compute dtype as the reference rounds
                it.
    two_stage   large M. A chunk of the weight is dequantized into a scratch that fits in half of the L2
                cache, and cuBLAS multiplies it. dX takes chunks of channels, not of rows, so that no partial
                sum is ever rounded or re-read.

A zero that is not an integer tensor, or an offset, makes the weight affine: scale * code' + t, code' = code -
2^(bits-1) and t = offset - scale * (zero - 2^(bits-1)). Where the scale is on the accumulator t meets the
sums of x over each group.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .launch import cdiv, launch
from .layout import LANES, group_count, packed_width, superblock
from .scratch import COLUMNS, dx_columns, forward_rows, forward_split, split
from .triton_common import (
    COMPUTE,
    INTERPRETED,
    LANE,
    add_in_order,
    codes_minus,
    codes_raw,
    codes_symmetric,
    compute_dtype,
    counters,
    fields,
    fma16,
    launch_options,
    mul16,
    plane_group,
    rows_of,
    use_asm,
)

# What the zero is: none (symmetric), integers (they go into the unpacking), or any floats.
SYMMETRIC, INTEGER, FLOAT = 0, 1, 2


@triton.constexpr_function
def _run(bits_fields, group):
    """Planes in a row that always share a group: the tile sees P / run groups per superblock."""
    return int(bits_fields) if int(group) == 0 else math.gcd(int(bits_fields), int(group) // LANES)


@triton.jit
def _group_values(
    source,
    plane,
    rows,
    mask,
    N,
    last_group,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    HAVE: tl.constexpr,
):
    """One row vector of `source` [G, N] per run of the COUNT planes from `plane`, as loaded; zeros where
    there is none.
    """
    values = ()
    for run in tl.static_range(COUNT // RUN):
        if not HAVE:
            values = values + (0.0,)
        elif GROUP == 0:
            values = values + (tl.load(source + rows, mask=mask, other=0),)
        else:
            group = tl.minimum((plane + run * RUN) // (GROUP // 32), last_group)
            values = values + (tl.load(source + group * N + rows, mask=mask, other=0),)
    return values


@triton.jit
def _code_operand(
    q, zero, PLANE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr
):
    """code - zero (integer zero [rows]) or code - 2^(BITS-1), exact."""
    if ZERO == 1:
        return codes_minus(q, zero.to(tl.float32)[:, None], PLANE, BITS, CT, ASM)
    else:
        return codes_symmetric(q, PLANE, BITS, CT, ASM)


@triton.jit
def _weight_operand(
    q,
    scale,
    zero,
    offset,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Plane PLANE of the weight, [rows, 32] in CT, from half-words q and the group's values [rows]: rounded
    once to CT.

    A 16-bit scale times an integer of at most 8 bits is exact in fp32, so the packed product is the
    reference's own. An fp32 scale is split in two, which costs one more instruction and keeps the single
    rounding but for ties.
    """
    if ZERO == 2 or OFFSET:
        value = codes_raw(q, PLANE, BITS, CT, ASM).to(tl.float32)
        if ZERO == 0:
            value -= 1 << (BITS - 1)
        else:
            value -= zero.to(tl.float32)[:, None]
        value *= scale.to(tl.float32)[:, None]
        if OFFSET:
            value += offset.to(tl.float32)[:, None]
        return value.to(CT)
    else:
        code = _code_operand(q, zero, PLANE, BITS, ZERO, CT, ASM)
        high = scale.to(CT)
        if ASM and scale.dtype == tl.float32:
            low = (scale - high.to(tl.float32)).to(CT)
            return fma16(code, high[:, None], mul16(code, low[:, None], CT, ASM), CT, ASM)
        else:
            return mul16(code, high[:, None], CT, ASM)


@triton.jit
def _step(
    acc,
    wp,
    xp,
    xsum,
    scales,
    zeros,
    offsets,
    plane,
    rm,
    in_m,
    K,
    groups,
    last_group,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
    ON_ACC: tl.constexpr,
    TAIL: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_M] += COUNT planes (whole superblocks) of the weight from `plane`, times x^T.

    RUN planes in a row share a group, whose values are one entry of scales, zeros and offsets. TAIL: some
    channels may lie beyond K.
    """
    lane = tl.arange(0, LANE)
    q = tl.load(wp)
    for run in tl.static_range(COUNT // RUN):
        part = acc
        if ON_ACC and GROUP != 0:
            part = tl.zeros_like(acc)
        for i in tl.static_range(RUN):
            if (run * RUN + i) % PLANES == 0 and run * RUN + i > 0:
                q = tl.load(wp + (run * RUN + i) // PLANES * LANE)
            mask = None
            if ON_ACC:
                mask = in_m[None, :]  # not read at all: with one row of sixteen this is traffic that counts
            if TAIL:
                mask = in_m[None, :] & ((plane + (run * RUN + i)) * LANE + lane < K)[:, None]
            if mask is None:
                x = tl.load(xp + (run * RUN + i) * LANE).to(CT)
            else:
                x = tl.load(xp + (run * RUN + i) * LANE, mask=mask, other=0.0).to(CT)
            if ON_ACC:
                w = _code_operand(q, zeros[run], (run * RUN + i) % PLANES, BITS, ZERO, CT, ASM)
            else:
                w = _weight_operand(
                    q,
                    scales[run],
                    zeros[run],
                    offsets[run],
                    (run * RUN + i) % PLANES,
                    BITS,
                    ZERO,
                    OFFSET,
                    CT,
                    ASM,
                )
            part = tl.dot(w, x, part, input_precision="ieee")
        if ON_ACC and GROUP != 0:
            scale = scales[run].to(tl.float32)
            acc += part * scale[:, None]
            if ZERO == 2 or OFFSET:
                # A group may be longer than a step: the sum of x over it counts once, where it starts.
                start = plane + run * RUN
                group = tl.minimum(start // (GROUP // 32), last_group)
                sums = tl.load(xsum + rm * groups + group, mask=in_m, other=0.0)
                sums = tl.where((start % (GROUP // 32) == 0) & (start * LANE < K), sums, 0.0)
                acc += _shift(scale, zeros[run], offsets[run], BITS, ZERO, OFFSET)[:, None] * sums[None, :]
        else:
            acc = part
    return acc


@triton.jit
def _shift(scale, zero, offset, BITS: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """t = offset - scale * (zero - 2^(BITS-1)), fp32 [rows]; the integer zero is in the operand already."""
    t = tl.zeros_like(scale)
    if ZERO == 2:
        t -= scale * (zero.to(tl.float32) - (1 << (BITS - 1)))
    if OFFSET:
        t += offset.to(tl.float32)
    return t


@triton.jit(do_not_specialize=["M", "groups", "per_part"])
def forward_kernel(
    x,
    codes,
    scale,
    zero,
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
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    ON_ACC: tl.constexpr,
    EVEN_K: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """y [M, N] = x [M, K] W^T, one [BLOCK_N, BLOCK_M] tile of y^T (or a part of its sum over K) per program.

    grid (tiles, PARTS); a part is per_part superblocks. ON_ACC: the decode regime. EVEN_K: K fills its
    superblocks.
    """
    COUNT: tl.constexpr = UNROLL * PLANES  # planes per step
    RUN: tl.constexpr = _run(COUNT, GROUP)
    S: tl.constexpr = PLANES * LANE
    # Neighbouring programs share rows of x and, in groups of GROUP_M, the weight tile: both stay in L2.
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    tile_m = band * GROUP_M + inside % height
    tile_n = inside // height

    rm = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    in_m = rm < M
    in_n = rn < N
    # Rows beyond N and M read the last row: no mask in the loop, and what they give is never stored.
    rows = tl.minimum(rn, N - 1).to(tl.int64)
    x_rows = tl.minimum(rm, M - 1)
    first = part * per_part
    whole = K // S
    stop = tl.minimum(first + per_part, tl.cdiv(K, S))
    main = first + (tl.maximum(tl.minimum(stop, whole) - first, 0) // UNROLL) * UNROLL
    wp = codes + rows[:, None] * stride_w + first * LANE + lane[None, :]
    xp = x + x_rows[None, :] * stride_x + first * S + lane[:, None]
    last_group = groups - 1
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    # Scales (2 bytes a thread) are too narrow for asynchronous copies. Decode, which waits for memory, loads
    # them one step ahead (two would end Triton's pipelining of the loop); the fused regime does not, because
    # a scale that travels through the loop sends the whole operand through shared memory where 8 warps share
    # it (sm_90: 4.6 instead of 4.0 instructions per weight).
    plane = first * PLANES
    scales = _group_values(scale, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, True)
    zeros = _group_values(zero, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, ZERO != 0)
    offsets = _group_values(offset, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, OFFSET)
    for block in range(first, main, UNROLL):
        plane = block * PLANES
        s_next, z_next, o_next = scales, zeros, offsets
        if GROUP != 0:
            ahead = plane
            if ON_ACC:
                ahead = plane + COUNT
            s_next = _group_values(scale, ahead, rn, in_n, N, last_group, COUNT, GROUP, RUN, True)
            z_next = _group_values(zero, ahead, rn, in_n, N, last_group, COUNT, GROUP, RUN, ZERO != 0)
            o_next = _group_values(offset, ahead, rn, in_n, N, last_group, COUNT, GROUP, RUN, OFFSET)
        if not ON_ACC:
            scales, zeros, offsets = s_next, z_next, o_next
        acc = _step(
            acc,
            wp,
            xp,
            xsum,
            scales,
            zeros,
            offsets,
            plane,
            rm,
            in_m,
            K,
            groups,
            last_group,
            BITS,
            PLANES,
            COUNT,
            GROUP,
            RUN,
            ZERO,
            OFFSET,
            CT,
            ASM,
            ON_ACC,
            False,
        )
        if ON_ACC:
            scales, zeros, offsets = s_next, z_next, o_next
        wp += UNROLL * LANE
        xp += UNROLL * S
    # What is left: superblocks that do not fill an unrolled step, and the last one, which K may not fill.
    if UNROLL == 1:
        if not EVEN_K:
            if main < stop:
                if GROUP != 0 and not ON_ACC:
                    plane = main * PLANES
                    scales = _group_values(scale, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, True)
                    zeros = _group_values(zero, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, ZERO != 0)
                    offsets = _group_values(offset, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, OFFSET)
                acc = _step(
                    acc,
                    wp,
                    xp,
                    xsum,
                    scales,
                    zeros,
                    offsets,
                    main * PLANES,
                    rm,
                    in_m,
                    K,
                    groups,
                    last_group,
                    BITS,
                    PLANES,
                    COUNT,
                    GROUP,
                    RUN,
                    ZERO,
                    OFFSET,
                    CT,
                    ASM,
                    ON_ACC,
                    True,
                )
    else:
        SHORT: tl.constexpr = _run(PLANES, GROUP)
        for block in tl.range(main, stop, num_stages=1):
            plane = block * PLANES
            s_tail = _group_values(scale, plane, rn, in_n, N, last_group, PLANES, GROUP, SHORT, True)
            z_tail = _group_values(zero, plane, rn, in_n, N, last_group, PLANES, GROUP, SHORT, ZERO != 0)
            o_tail = _group_values(offset, plane, rn, in_n, N, last_group, PLANES, GROUP, SHORT, OFFSET)
            acc = _step(
                acc,
                wp,
                xp,
                xsum,
                s_tail,
                z_tail,
                o_tail,
                plane,
                rm,
                in_m,
                K,
                groups,
                last_group,
                BITS,
                PLANES,
                PLANES,
                GROUP,
                SHORT,
                ZERO,
                OFFSET,
                CT,
                ASM,
                ON_ACC,
                True,
            )
            wp += LANE
            xp += S
    if ON_ACC and GROUP == 0:
        row_scale = scales[0].to(tl.float32)
        acc *= row_scale[:, None]
        if (ZERO == 2 or OFFSET) and part == 0:
            sums = tl.load(xsum + rm, mask=in_m, other=0.0)
            acc += _shift(row_scale, zeros[0], offsets[0], BITS, ZERO, OFFSET)[:, None] * sums[None, :]

    mask = in_n[:, None] & in_m[None, :]
    out = rm[None, :] * N + rn[:, None]
    if PARTS == 1:
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)
    else:
        size = tl.cast(M, tl.int64) * N
        total, last = add_in_order(acc, out, mask, work, arrived, pid, size, PARTS, part)
        tl.store(y + out, total.to(y.dtype.element_ty), mask=mask & last)


@triton.jit
def _join(planes, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT (1, 2, 4, 8) planes [ROWS, 32] side by side: [ROWS, 32 * COUNT]."""
    if COUNT == 1:
        return planes[0]
    elif COUNT == 2:
        pair = tl.permute(tl.join(planes[0], planes[1]), (0, 2, 1))
        return tl.reshape(pair, (ROWS, 2 * LANE))
    elif COUNT == 4:
        four = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
        return tl.reshape(tl.permute(four, (0, 2, 3, 1)), (ROWS, 4 * LANE))
    else:
        even = tl.join(tl.join(planes[0], planes[4]), tl.join(planes[2], planes[6]))
        odd = tl.join(tl.join(planes[1], planes[5]), tl.join(planes[3], planes[7]))
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1)), (ROWS, 8 * LANE))


@triton.jit
def _dx_step(
    acc,
    wp,
    yp,
    scale,
    zero,
    offset,
    group_rows,
    right,
    rows,
    n,
    N,
    in_m,
    stride_w,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
    JOIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """acc += rows n.. of the weight, COUNT planes, with their columns of dY. TAIL: some rows may lie beyond
    N.

    Those read row N-1 (finite) with scale, zero and dY 0. `right`: bits to drop, where a program has not the
    first planes.
    """
    at = n + rows
    if TAIL:
        in_n = at < N
        at = tl.minimum(at, N - 1)
        if JOIN:
            dy = tl.load(yp, mask=in_m[:, None] & in_n[None, :], other=0.0).to(CT)
        else:
            dy = tl.load(yp, mask=in_m[None, :] & in_n[:, None], other=0.0).to(CT)
    elif JOIN:
        dy = tl.load(yp, mask=in_m[:, None], other=0.0).to(CT)
    else:
        dy = tl.load(yp, mask=in_m[None, :], other=0.0).to(CT)
    q = tl.load(wp + at.to(tl.int64)[:, None] * stride_w)
    if right is not None:
        q = q >> right
    s, z, o = 0.0, 0.0, 0.0
    planes = ()
    sums = ()
    for i in tl.static_range(COUNT):
        if i % RUN == 0:
            group = group_rows[i // RUN] + at
            s = tl.load(scale + group)
            if ZERO != 0:
                z = tl.load(zero + group)
            if OFFSET:
                o = tl.load(offset + group)
        w = _weight_operand(q, s, z, o, i, BITS, ZERO, OFFSET, CT, ASM)
        if JOIN:
            planes = planes + (w,)
        else:
            sums = sums + (tl.dot(tl.trans(w), dy, acc[i], input_precision="ieee"),)
    if JOIN:
        return (tl.dot(dy, _join(planes, q.shape[0], COUNT), acc[0], input_precision="ieee"),)
    else:
        return sums


@triton.jit(do_not_specialize=["M", "groups", "per_part"])
def dx_kernel(
    dy,
    codes,
    scale,
    zero,
    offset,
    dx,
    work,
    arrived,
    M,
    N,
    K,
    stride_y,
    stride_w,
    groups,
    per_part,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_N: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dx [M, K] = dy [M, N] W: BLOCK_M rows by COUNT planes of a superblock (or a part of the sum over N) per
    program.

    grid (tiles, PARTS); a part is per_part blocks of BLOCK_N rows of the weight. JOIN: the planes side by
    side are the second operand of one wide product (wgmma reads it from shared memory); otherwise each plane,
    transposed in registers by ldmatrix, is the first operand of its own.
    """
    RUN: tl.constexpr = _run(COUNT, GROUP)
    CHUNKS: tl.constexpr = PLANES // COUNT
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    piece = pid // tiles_m  # neighbouring programs share the weight tile
    block = piece // CHUNKS
    first_plane = block * PLANES
    right = None
    if CHUNKS > 1:
        chunk = piece % CHUNKS
        first_plane += chunk * COUNT
        right = (chunk * (COUNT * BITS)).to(tl.int16)
    group_rows = ()
    for run in tl.static_range(COUNT // RUN):
        if GROUP == 0:
            group_rows = group_rows + (0,)
        else:
            group_rows = group_rows + (
                tl.minimum((first_plane + run * RUN) // (GROUP // 32), groups - 1) * N,
            )

    rm = ((pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    in_m = rm < M
    wp = codes + block * LANE + lane[None, :]
    first = part * per_part * BLOCK_N
    stop = tl.minimum(first + per_part * BLOCK_N, N)
    if JOIN:
        acc = (tl.zeros((BLOCK_M, COUNT * LANE), tl.float32),)
        yp = dy + rm[:, None] * stride_y + first + rows[None, :]
    else:
        acc = ()
        for _i in tl.static_range(COUNT):
            acc = acc + (tl.zeros((LANE, BLOCK_M), tl.float32),)
        yp = dy + rm[None, :] * stride_y + first + rows[:, None]

    main = first + tl.maximum(stop - first, 0) // BLOCK_N * BLOCK_N
    for n in range(first, main, BLOCK_N):
        acc = _dx_step(
            acc,
            wp,
            yp,
            scale,
            zero,
            offset,
            group_rows,
            right,
            rows,
            n,
            N,
            in_m,
            stride_w,
            COUNT,
            BITS,
            RUN,
            ZERO,
            OFFSET,
            CT,
            ASM,
            JOIN,
            False,
        )
        yp += BLOCK_N
    if not EVEN_N:
        if main < stop:
            acc = _dx_step(
                acc,
                wp,
                yp,
                scale,
                zero,
                offset,
                group_rows,
                right,
                rows,
                main,
                N,
                in_m,
                stride_w,
                COUNT,
                BITS,
                RUN,
                ZERO,
                OFFSET,
                CT,
                ASM,
                JOIN,
                True,
            )

    size = tl.cast(M, tl.int64) * K
    if JOIN:
        rk = first_plane * LANE + tl.arange(0, COUNT * LANE)
        mask = in_m[:, None] & (rk < K)[None, :]
        out = rm[:, None] * K + rk[None, :]
        if PARTS == 1:
            tl.store(dx + out, acc[0].to(dx.dtype.element_ty), mask=mask)
        else:
            total, last = add_in_order(acc[0], out, mask, work, arrived, pid, size, PARTS, part)
            tl.store(dx + out, total.to(dx.dtype.element_ty), mask=mask & last)
    else:
        for i in tl.static_range(COUNT):
            rk = (first_plane + i) * LANE + lane
            mask = in_m[None, :] & (rk < K)[:, None]
            out = rm[None, :] * K + rk[:, None]
            if PARTS == 1:
                tl.store(dx + out, acc[i].to(dx.dtype.element_ty), mask=mask)
            else:
                total, last = add_in_order(
                    acc[i], out, mask, work, arrived, pid * COUNT + i, size, PARTS, part
                )
                tl.store(dx + out, total.to(dx.dtype.element_ty), mask=mask & last)


@triton.jit(do_not_specialize=["N", "blocks", "first_block", "groups"])
def dequantize_kernel(
    codes,
    scale,
    zero,
    offset,
    out,
    N,
    K,
    stride_w,
    stride_o,
    blocks,
    first_block,
    groups,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    """out [N, columns of `blocks` superblocks from first_block] = the weight, computed in fp32 and rounded
    once.

    `codes` starts at the first row of the chunk and `SCALE_ROWS` apart are the groups of its (full-height)
    group tensors, which start there too. One program: BLOCK_N rows of one superblock.
    """
    RUN: tl.constexpr = _run(PLANES, GROUP)
    pid = tl.program_id(0)
    column = pid % blocks
    block = first_block + column
    rn = pid // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    in_n = rn < N
    rows = rn.to(tl.int64)
    q = tl.load(codes + rows[:, None] * stride_w + block * LANE + lane[None, :], mask=in_n[:, None], other=0)
    scales = _group_values(scale, block * PLANES, rn, in_n, SCALE_ROWS, groups - 1, PLANES, GROUP, RUN, True)
    zeros = _group_values(
        zero, block * PLANES, rn, in_n, SCALE_ROWS, groups - 1, PLANES, GROUP, RUN, ZERO != 0
    )
    offsets = _group_values(
        offset, block * PLANES, rn, in_n, SCALE_ROWS, groups - 1, PLANES, GROUP, RUN, OFFSET
    )
    for plane in tl.static_range(PLANES):
        value = codes_raw(q, plane, BITS, CT, ASM).to(tl.float32)
        if ZERO == 0:
            value -= 1 << (BITS - 1)
        else:
            value -= zeros[plane // RUN].to(tl.float32)[:, None]
        value *= scales[plane // RUN].to(tl.float32)[:, None]
        if OFFSET:
            value += offsets[plane // RUN].to(tl.float32)[:, None]
        at = (column * PLANES + plane) * LANE + lane
        mask = in_n[:, None] & ((block * PLANES + plane) * LANE + lane < K)[None, :]
        tl.store(out + rows[:, None] * stride_o + at[None, :], value.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------ launchers


def _zero_kind(zero: Tensor | None) -> int:
    if zero is None:
        return SYMMETRIC
    return FLOAT if zero.is_floating_point() else INTEGER


class _Weight:
    """The packed weight as the kernels take it, and the constants that go with it."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        offset: Tensor | None,
        bits: int,
        k: int,
        group_size: int,
    ):
        n, groups = codes.shape[0], group_count(k, group_size)
        assert codes.dtype == torch.int16 and codes.shape[1] == packed_width(k, bits), (
            codes.shape,
            codes.dtype,
            k,
            bits,
        )
        assert scale.shape == (groups, n), (scale.shape, groups, n)
        self.n, self.k, self.bits, self.groups = n, k, bits, groups
        self.codes = codes if codes.stride(1) == 1 else codes.contiguous()
        self.scale = scale.contiguous()
        self.zero = self.scale if zero is None else zero.contiguous()
        self.offset = self.scale if offset is None else offset.contiguous()
        self.kind, self.affine = _zero_kind(zero), _zero_kind(zero) == FLOAT or offset is not None
        self.constants = {
            "BITS": bits,
            "PLANES": fields(bits),
            "GROUP": plane_group(group_size, k),
            "ZERO": self.kind,
            "OFFSET": offset is not None,
        }

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.zero, self.offset


def _launch(config: dict, fusion: bool = False) -> dict:
    """The launch options of a table entry. Without fusion a multiplication and an addition stay two
    roundings, so that the weight has the reference's bits; the decode regime, whose weight is an integer, may
    contract them."""
    return {**launch_options(config), "enable_fp_fusion": fusion}


def _workspace(
    parts: int, slots: int, size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if parts == 1:
        return None, None
    return torch.empty(parts * size, dtype=torch.float32, device=device), counters(slots, device)


def group_sums(x: Tensor, group_size: int) -> Tensor:
    """Sums of x [M, K] over the channels of each group, fp32 [M, G]."""
    m, k = x.shape
    if group_size == -1 or group_size >= k:
        return x.sum(1, keepdim=True, dtype=torch.float32)
    if k % group_size:
        x = torch.nn.functional.pad(x, (0, -k % group_size))
    return x.reshape(m, -1, group_size).sum(-1, dtype=torch.float32)


def packed_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [..., K] times the packed weight [N, K] -> [..., N] in x's dtype. Arguments as the op of this name
    (matmul.py).
    """
    k, n = x.shape[-1], codes.shape[0]
    shape, dtype = (*x.shape[:-1], n), x.dtype
    flat = rows_of(x.detach()).to(compute_dtype(dtype))
    m = flat.shape[0]
    if m == 0 or n == 0:
        return x.new_empty(shape)
    weight = _Weight(codes, scale.detach(), zero, offset, bits, k, group_size)
    config = dispatch.config("packed_matmul", bits, dtype, m, n, k)
    if config["regime"] == "two_stage":
        y = _forward_two_stage(flat, weight, config)
    else:
        y = _forward(flat, weight, config, group_size)
    return y.to(dtype).view(shape)


def _forward(x: Tensor, weight: _Weight, config: dict, group_size: int) -> Tensor:
    (m, k), n = x.shape, weight.n
    tile, block = _forward_tile(config, m), superblock(weight.bits)
    on_acc = tile["ON_ACC"]
    tiles = cdiv(m, tile["BLOCK_M"]) * cdiv(n, tile["BLOCK_N"])
    parts, per_part = forward_split(m, n, k, weight.bits, config)
    y = x.new_empty(m, n)
    work, arrived = _workspace(parts, tiles, m * n, x.device)
    sums = group_sums(x, group_size) if on_acc and weight.affine else x
    launch(
        forward_kernel,
        (tiles, parts),
        x,
        *weight.tensors,
        sums,
        y,
        y if work is None else work,
        y if arrived is None else arrived,
        m,
        n,
        k,
        x.stride(0),
        weight.codes.stride(0),
        weight.groups,
        per_part,
        **weight.constants,
        **tile,
        EVEN_K=k % block == 0,
        CT=COMPUTE[x.dtype],
        ASM=use_asm(x.dtype),
        PARTS=parts,
        **_launch(config, on_acc),
    )
    return y


def _forward_tile(config: dict, m: int) -> dict:
    """The constants of forward_kernel that a table entry decides."""
    decode = config["regime"] == "decode"
    rows = config["BLOCK_M"]
    if decode and m <= 8 and not INTERPRETED:
        rows = min(
            rows, 8
        )  # tensor cores take 8 columns of the second operand; the interpreter's dot does not
    return {
        "ON_ACC": decode,
        "BLOCK_M": rows,
        "BLOCK_N": config["BLOCK_N"],
        "GROUP_M": config.get("GROUP_M", 8),
        "UNROLL": config.get("UNROLL", 1),
    }


def _dequantize_into(
    out: Tensor, weight: _Weight, first_row: int, first_block: int, blocks: int, config: dict
) -> None:
    """out [rows, channels] = that part of the weight, `blocks` superblocks wide (less where K ends)."""
    rows = out.shape[0]
    codes = weight.codes[first_row : first_row + rows]
    group_values = [values[:, first_row : first_row + rows] for values in weight.tensors[1:]]
    launch(
        dequantize_kernel,
        (-(-rows // config["BLOCK_N"]) * blocks,),
        codes,
        *group_values,
        out,
        rows,
        weight.k,
        codes.stride(0),
        out.stride(0),
        blocks,
        first_block,
        weight.groups,
        **weight.constants,
        CT=COMPUTE[out.dtype],
        ASM=use_asm(out.dtype),
        BLOCK_N=config["BLOCK_N"],
        SCALE_ROWS=weight.n,
        **_launch(config),
    )


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns], each row on a 16-byte boundary, as cuBLAS wants it for its fast paths."""
    padded = -(-columns // 8) * 8
    return like.new_empty(rows, padded)[:, :columns]


def _forward_two_stage(x: Tensor, weight: _Weight, config: dict) -> Tensor:
    (m, k), n = x.shape, weight.n
    step = forward_rows(n, k, x.element_size(), config)
    tiles = dispatch.config("dequantize", weight.bits, x.dtype, m, n, k)
    scratch = _scratch(step, k, x)
    y = x.new_empty(m, n)
    for first in range(0, n, step):
        chunk = scratch[: min(step, n - first)]
        _dequantize_into(chunk, weight, first, 0, -(-k // superblock(weight.bits)), tiles)
        torch.mm(x, chunk.t(), out=y[:, first : first + chunk.shape[0]])
    return y


def packed_matmul_dx(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    """dX = dY W, dy [..., N] -> [..., K] in dy's dtype. Arguments as the op of this name (matmul.py)."""
    n, k = codes.shape[0], in_features
    shape, dtype = (*dy.shape[:-1], k), dy.dtype
    flat = rows_of(dy.detach()).to(compute_dtype(dtype))
    m = flat.shape[0]
    if m == 0 or n == 0:
        return dy.new_zeros(shape)
    weight = _Weight(codes, scale.detach(), zero, offset, bits, k, group_size)
    config = dispatch.config("packed_matmul_dx", bits, dtype, m, n, k)
    dx = _dx_two_stage(flat, weight, config) if config["regime"] == "two_stage" else _dx(flat, weight, config)
    return dx.to(dtype).view(shape)


def _dx(dy: Tensor, weight: _Weight, config: dict) -> Tensor:
    (m, n), k = dy.shape, weight.k
    tile = _dx_tile(config, weight.bits, dispatch.architecture())
    count = tile["COUNT"]
    tiles = cdiv(m, tile["BLOCK_M"]) * cdiv(k, superblock(weight.bits)) * (fields(weight.bits) // count)
    parts, per_part = split(config.get("SPLIT_N", 1), tiles, cdiv(n, tile["BLOCK_N"]))
    dx = dy.new_empty(m, k)
    work, arrived = _workspace(parts, tiles * (1 if tile["JOIN"] else count), m * k, dy.device)
    launch(
        dx_kernel,
        (tiles, parts),
        dy,
        *weight.tensors,
        dx,
        dx if work is None else work,
        dx if arrived is None else arrived,
        m,
        n,
        k,
        dy.stride(0),
        weight.codes.stride(0),
        weight.groups,
        per_part,
        **weight.constants,
        **tile,
        EVEN_N=n % tile["BLOCK_N"] == 0,
        CT=COMPUTE[dy.dtype],
        ASM=use_asm(dy.dtype),
        PARTS=parts,
        **_launch(config),
    )
    return dx


def _dx_tile(config: dict, bits: int, arch: int) -> dict:
    """The constants of dx_kernel that a table entry decides."""
    planes = fields(bits)
    # wgmma and its successor want one wide product; mma.sync wants the weight in registers. 5 planes are no
    # power of two.
    join = config.get("JOIN", arch // 10 in (9, 10)) and planes != 5
    count = 5 if planes == 5 else min(config.get("PLANES", 4), planes)
    return {"COUNT": count, "JOIN": join, "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"]}


_COLUMNS = COLUMNS


def _dx_two_stage(dy: Tensor, weight: _Weight, config: dict) -> Tensor:
    (m, n), k = dy.shape, weight.k
    block = superblock(weight.bits)
    step = dx_columns(n, k, dy.element_size(), weight.bits, config, _COLUMNS)
    tiles = dispatch.config("dequantize", weight.bits, dy.dtype, m, n, k)
    scratch = _scratch(n, step, dy)
    dx = dy.new_empty(m, k)
    for first in range(0, k, step):
        chunk = scratch[:, : min(step, k - first)]
        _dequantize_into(chunk, weight, 0, first // block, -(-chunk.shape[1] // block), tiles)
        torch.mm(dy, chunk, out=dx[:, first : first + chunk.shape[1]])
    return dx


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [N, K] in dtype, bit for bit the reference's. Arguments as the op of this name
    (pack.py).
    """
    weight = _Weight(codes, scale.detach(), zero, offset, bits, in_features, group_size)
    out = torch.empty(weight.n, in_features, dtype=compute_dtype(dtype), device=codes.device)
    if weight.n:
        config = dispatch.config("dequantize", bits, dtype, weight.n, weight.n, in_features)
        _dequantize_into(out, weight, 0, 0, -(-in_features // superblock(bits)), config)
    return out.to(dtype)


# --------------------------------------------------------------------------------- what the AOT gate compiles


def _case(
    kind: str,
    bits: int,
    dtype: str,
    scale: str,
    zero: str,
    group: int,
    config: dict,
    tile: dict,
    only: tuple = (),
) -> tuple:
    """One entry of aot_cases: a kernel as its launcher would start it, with K and N that fill their blocks
    except for 3 bits.
    """
    planes, compute = fields(bits), {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
    constants = {
        "BITS": bits,
        "PLANES": planes,
        "GROUP": group,
        "ZERO": {"": SYMMETRIC, "uint8": INTEGER, "float": FLOAT}[zero],
        "OFFSET": zero == "float",
        "CT": compute,
        "ASM": dtype != "fp32",
        **tile,
    }
    values = {
        "codes": "*i16",
        "scale": f"*{scale}",
        "zero": "*u8" if zero == "uint8" else "*fp32",
        "offset": "*fp32",
    }
    split = {"work": "*fp32", "arrived": "*i32", "M": "i32", "N": "i32", "K": "i32"}
    rest = {"stride_w": "i32", "groups": "i32", "per_part": "i32"}
    weights = tile["BLOCK_N"] * LANES
    if kind in ("decode", "fused"):
        function, weights = forward_kernel, weights * planes * tile["UNROLL"]
        signature = {
            "x": f"*{dtype}",
            **values,
            "xsum": "*fp32",
            "y": f"*{dtype}",
            **split,
            "stride_x": "i32",
            **rest,
        }
        constants |= {"EVEN_K": bits != 3, "PARTS": 4 if kind == "decode" else 1}
    elif kind == "dx":
        function, weights = dx_kernel, weights * tile["COUNT"]
        signature = {"dy": f"*{dtype}", **values, "dx": f"*{dtype}", **split, "stride_y": "i32", **rest}
        constants |= {"EVEN_N": True, "PARTS": 4 if config["regime"] == "decode" else 1}
    else:
        function, weights = dequantize_kernel, None
        sizes = ("N", "K", "stride_w", "stride_o", "blocks", "first_block", "groups")
        signature = {**values, "out": f"*{dtype}", **dict.fromkeys(sizes, "i32")}
        constants |= {"SCALE_ROWS": 4096}
    options = _launch(config, kind == "decode")
    name = f"{kind} {bits}-bit {dtype} scale {scale}{' zero ' + zero if zero else ''} g{group}"
    name += "".join(
        f" {key}{int(tile[key])}" for key in ("BLOCK_M", "BLOCK_N", "UNROLL", "JOIN") if key in tile
    )
    name += f" w{options['num_warps']} s{options['num_stages']}".replace("BLOCK_", "")
    return (
        name.replace("BLOCK_", ""),
        function,
        signature,
        constants,
        options,
        weights,
        *([only] if only else []),
    )


_GATED = (80, 86, 89, 90, 120)


def _table_kernels() -> dict[tuple, list[int]]:
    """(kind, bits, entry, tile) -> architectures, for every entry of the packaged table that bf16 layers
    can be given.
    """
    found: dict[tuple, list[int]] = {}
    for op, bits, m, arch in itertools.product(
        ("packed_matmul", "packed_matmul_dx"), (2, 3, 4, 8), (1, 16, 32, 64, 128, 512), _GATED
    ):
        config = dispatch.packaged(op, bits, torch.bfloat16, m, 4096, 4096, arch)
        if config["regime"] != "two_stage":
            tile = _forward_tile(config, m) if op == "packed_matmul" else _dx_tile(config, bits, arch)
            kind = "dx" if op == "packed_matmul_dx" else config["regime"]
            case = (kind, bits, tuple(config.items()), tuple(tile.items()))
            if arch not in found.setdefault(case, []):
                found[case].append(arch)
    return found


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles: the table's, and the other dtypes, zeros and groups that make another
    kernel of an entry.
    """
    cases = [
        _case(kind, bits, "bf16", "bf16", "", 128, dict(config), dict(tile), tuple(archs))
        for (kind, bits, config, tile), archs in _table_kernels().items()
    ]
    for m, dtype, scale, zero, group in (
        (1, "bf16", "bf16", "uint8", 128),
        (1, "bf16", "fp32", "float", 128),
        (1, "fp16", "bf16", "", 128),
        (128, "bf16", "fp32", "float", 128),
        (64, "fp16", "bf16", "uint8", 64),
        (64, "bf16", "bf16", "", 0),
    ):
        config = dispatch.packaged("packed_matmul", 4, torch.bfloat16, m, 4096, 4096, 80)
        cases.append(_case(config["regime"], 4, dtype, scale, zero, group, config, _forward_tile(config, m)))
    # Group values of 4 bytes for every plane take the most shared memory: what a training layer of small
    # groups asks for.
    for (kind, bits, config, tile), archs in _table_kernels().items():
        if kind == "fused":
            cases.append(
                _case(kind, bits, "bf16", "fp32", "float", 32, dict(config), dict(tile), tuple(archs))
            )
    config = dispatch.packaged("packed_matmul_dx", 4, torch.bfloat16, 16, 4096, 4096, 80)
    cases.append(_case("dx", 4, "bf16", "fp32", "float", 128, config, _dx_tile(config, 4, 80)))
    for bits, dtype, scale, zero in ((4, "bf16", "bf16", ""), (3, "fp32", "fp32", "float")):
        config = dispatch.packaged("dequantize", bits, torch.bfloat16, 4096, 4096, 4096, 80)
        cases.append(
            _case("dequantize", bits, dtype, scale, zero, 128, config, {"BLOCK_N": config["BLOCK_N"]})
        )
    return cases
