"""dX = dY W on chip, from the rows of the packed weight (matmul_triton.py).

Either each plane, transposed in registers, is the first operand of its own product (dX^T = W^T dY^T), or the
planes side by side are the second operand of one wide product.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .launch import cdiv, launch
from .layout import superblock
from .matmul_weight_triton import Weight, options_of, run_of, weight_operand, workspace
from .scratch import split
from .triton_common import COMPUTE, LANE, fields, lines_of, place_of, plane_codes, store_parts, use_asm


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


@triton.constexpr_function
def dropped_of(bits):
    """Bits of a plane in the half-words that a program drops planes of: of 6 bits the high two."""
    return 2 if int(bits) == 6 else int(bits)


@triton.jit
def _dx_step(
    acc, wp, hp, yp, scale, zero, offset, group_rows, right, rows, n, N, in_m, stride_w,
    COUNT: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    CT: tl.constexpr, ASM: tl.constexpr, JOIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """acc += rows n.. of the weight, COUNT planes, with their columns of dY. TAIL: some rows may lie beyond
    N.

    Those read row N-1 (finite) with scale, zero and dY 0. `right`: bits to drop, where a program has not the
    first planes; of 6 bits those of the high two, read at hp.
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
    high = q
    if BITS == 6:
        high = tl.load(hp + at.to(tl.int64)[:, None] * stride_w) >> right
    elif right is not None:
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
        code = plane_codes(q, high, i, BITS)
        w = weight_operand(code, s, z, o, place_of(BITS, i), BITS, ZERO, OFFSET, CT, ASM)
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
    dy, codes, scale, zero, offset, dx, work, arrived, M, N, K, stride_y, stride_w, groups, per_part,
    BITS: tl.constexpr, PLANES: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, EVEN_N: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr, JOIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dx [M, K] = dy [M, N] W: BLOCK_M rows by COUNT planes of a superblock (or a part of the sum over N) per
    program.

    grid (tiles, PARTS); a part is per_part blocks of BLOCK_N rows of the weight. JOIN: the planes side by
    side are the second operand of one wide product (wgmma reads it from shared memory); otherwise each plane,
    transposed in registers by ldmatrix, is the first operand of its own.
    """
    RUN: tl.constexpr = run_of(COUNT, GROUP)
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
        right = (chunk * (COUNT * dropped_of(BITS))).to(tl.int16)
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
    wp = codes + block * lines_of(BITS) * LANE + lane[None, :]
    hp = wp + 2 * LANE
    if BITS == 6:
        wp += chunk * LANE
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
            acc, wp, hp, yp, scale, zero, offset, group_rows, right, rows, n, N, in_m, stride_w,
            COUNT, BITS, RUN, ZERO, OFFSET, CT, ASM, JOIN, False,
        )  # fmt: skip
        yp += BLOCK_N
    if not EVEN_N:
        if main < stop:
            acc = _dx_step(
                acc, wp, hp, yp, scale, zero, offset, group_rows, right, rows, main, N, in_m, stride_w,
                COUNT, BITS, RUN, ZERO, OFFSET, CT, ASM, JOIN, True,
            )  # fmt: skip

    size = tl.cast(M, tl.int64) * K
    if JOIN:
        rk = first_plane * LANE + tl.arange(0, COUNT * LANE)
        mask = in_m[:, None] & (rk < K)[None, :]
        out = rm[:, None] * K + rk[None, :]
        store_parts(dx, acc[0], out, mask, work, arrived, pid, size, PARTS, part)
    else:
        for i in tl.static_range(COUNT):
            rk = (first_plane + i) * LANE + lane
            mask = in_m[None, :] & (rk < K)[:, None]
            out = rm[None, :] * K + rk[:, None]
            store_parts(dx, acc[i], out, mask, work, arrived, pid * COUNT + i, size, PARTS, part)


def dx_on_chip(dy: Tensor, weight: Weight, config: dict) -> Tensor:
    (m, n), k = dy.shape, weight.k
    tile = dx_tile(config, weight.bits, dispatch.architecture())
    count = tile["COUNT"]
    tiles = cdiv(m, tile["BLOCK_M"]) * cdiv(k, superblock(weight.bits)) * (fields(weight.bits) // count)
    parts, per_part = split(config.get("SPLIT_N", 1), tiles, cdiv(n, tile["BLOCK_N"]))
    dx = dy.new_empty(m, k)
    work, arrived = workspace(parts, tiles * (1 if tile["JOIN"] else count), m * k, dy.device)
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
        **options_of(config),
    )
    return dx


def dx_tile(config: dict, bits: int, arch: int) -> dict:
    """The constants of dx_kernel that a table entry decides."""
    planes = fields(bits)
    # wgmma and its successor want one wide product; mma.sync wants the weight in registers. 5 planes are no
    # power of two.
    join = config.get("JOIN", arch // 10 in (9, 10)) and planes != 5
    count = 5 if planes == 5 else min(config.get("PLANES", 4), planes)
    if bits == 6:
        count = 4  # those of one line
    return {"COUNT": count, "JOIN": join, "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"]}
