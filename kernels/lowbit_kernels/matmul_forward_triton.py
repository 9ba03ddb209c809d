"""y = x W^T on chip: the decode and the fused regime, which are one kernel (matmul_triton.py).

The product is computed transposed, y^T = W x^T, so that the weight is the operand in registers. Decode puts
the code on the tensor core and the scale on the accumulator; fused puts the whole weight there.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch
from .layout import superblock
from .matmul_weight_triton import (
    Weight,
    code_operand,
    grid_of,
    options_of,
    run_of,
    shift_of,
    weight_operand,
    workspace,
)
from .scratch import forward_split
from .triton_common import (
    COMPUTE,
    INTERPRETED,
    LANE,
    lines_of,
    place_of,
    plane_codes,
    store_parts,
    use_asm,
)


@triton.jit
def _step(
    acc, wp, xp, xsum, scales, zeros, offsets, plane, rm, in_m, K, groups, last_group,
    BITS: tl.constexpr, PLANES: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr, ON_ACC: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] += COUNT planes (whole superblocks) of the weight from `plane`, times x^T.

    RUN planes in a row share a group, whose values are one entry of scales, zeros and offsets. TAIL: some
    channels may lie beyond K.
    """
    lane = tl.arange(0, LANE)
    LINES: tl.constexpr = lines_of(BITS)
    q = tl.load(wp)
    high = q
    if BITS == 6:
        high = tl.load(wp + 2 * LANE)
    for run in tl.static_range(COUNT // RUN):
        part = acc
        if ON_ACC and GROUP != 0:
            part = tl.zeros_like(acc)
        for i in tl.static_range(RUN):
            if (run * RUN + i) % PLANES == 0 and run * RUN + i > 0:
                q = tl.load(wp + (run * RUN + i) // PLANES * LINES * LANE)
                if BITS == 6:
                    high = tl.load(wp + ((run * RUN + i) // PLANES * LINES + 2) * LANE)
            if BITS == 6 and (run * RUN + i) % PLANES == 4:
                q = tl.load(wp + ((run * RUN + i) // PLANES * LINES + 1) * LANE)
            code = plane_codes(q, high, (run * RUN + i) % PLANES, BITS)
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
                w = code_operand(
                    code, zeros[run], place_of(BITS, (run * RUN + i) % PLANES), BITS, ZERO, CT, ASM
                )
            else:
                s, z, o = scales[run], zeros[run], offsets[run]
                w = weight_operand(
                    code, s, z, o, place_of(BITS, (run * RUN + i) % PLANES), BITS, ZERO, OFFSET, CT, ASM
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
                acc += shift_of(scale, zeros[run], offsets[run], BITS, ZERO, OFFSET)[:, None] * sums[None, :]
        else:
            acc = part
    return acc


@triton.jit
def _tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of program pid's tile. Neighbours share rows of x and, in groups of GROUP_M, the weight
    tile: both stay in L2.
    """
    band = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return band * GROUP_M + inside % height, inside // height


@triton.jit
def _left_over(
    acc, wp, xp, xsum, scale, zero, offset, scales, zeros, offsets, main, stop, rm, rn, in_m, in_n,
    N, K, groups,
    BITS: tl.constexpr, PLANES: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr, ON_ACC: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """acc + what the unrolled steps of COUNT planes left: superblocks main..stop that do not fill a step, and
    the last one, which K may not fill.
    """
    last_group = groups - 1
    RUN: tl.constexpr = run_of(COUNT, GROUP)
    if COUNT == PLANES:
        if not EVEN_K:
            if main < stop:
                if GROUP != 0 and not ON_ACC:
                    plane = main * PLANES
                    scales, zeros, offsets = grid_of(
                        scale, zero, offset, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, ZERO, OFFSET
                    )
                acc = _step(
                    acc, wp, xp, xsum, scales, zeros, offsets, main * PLANES, rm, in_m, K, groups, last_group,
                    BITS, PLANES, COUNT, GROUP, RUN, ZERO, OFFSET, CT, ASM, ON_ACC, True,
                )  # fmt: skip
    else:
        SHORT: tl.constexpr = run_of(PLANES, GROUP)
        for block in tl.range(main, stop, num_stages=1):
            plane = block * PLANES
            s_tail, z_tail, o_tail = grid_of(
                scale, zero, offset, plane, rn, in_n, N, last_group, PLANES, GROUP, SHORT, ZERO, OFFSET
            )
            acc = _step(
                acc, wp, xp, xsum, s_tail, z_tail, o_tail, plane, rm, in_m, K, groups, last_group,
                BITS, PLANES, PLANES, GROUP, SHORT, ZERO, OFFSET, CT, ASM, ON_ACC, True,
            )  # fmt: skip
            wp += lines_of(BITS) * LANE
            xp += PLANES * LANE
    return acc


@triton.jit(do_not_specialize=["M", "groups", "per_part"])
def forward_kernel(
    x, codes, scale, zero, offset, xsum, y, work, arrived, M, N, K, stride_x, stride_w, groups, per_part,
    BITS: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    ON_ACC: tl.constexpr, EVEN_K: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T, one [BLOCK_N, BLOCK_M] tile of y^T (or a part of its sum over K) per program.

    grid (tiles, PARTS); a part is per_part superblocks. ON_ACC: the decode regime. EVEN_K: K fills its
    superblocks.
    """
    COUNT: tl.constexpr = UNROLL * PLANES  # planes per step
    RUN: tl.constexpr = run_of(COUNT, GROUP)
    S: tl.constexpr = PLANES * LANE
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tile_m, tile_n = _tile_of(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
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
    wp = codes + rows[:, None] * stride_w + first * lines_of(BITS) * LANE + lane[None, :]
    xp = x + x_rows[None, :] * stride_x + first * S + lane[:, None]
    last_group = groups - 1
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    # Scales (2 bytes a thread) are too narrow for asynchronous copies. Decode, which waits for memory, loads
    # them one step ahead (two would end Triton's pipelining of the loop); the fused regime does not, because
    # a scale that travels through the loop sends the whole operand through shared memory where 8 warps share
    # it (sm_90: 4.6 instead of 4.0 instructions per weight).
    plane = first * PLANES
    scales, zeros, offsets = grid_of(
        scale, zero, offset, plane, rn, in_n, N, last_group, COUNT, GROUP, RUN, ZERO, OFFSET
    )
    for block in range(first, main, UNROLL):
        plane = block * PLANES
        s_next, z_next, o_next = scales, zeros, offsets
        if GROUP != 0:
            ahead = plane
            if ON_ACC:
                ahead = plane + COUNT
            s_next, z_next, o_next = grid_of(
                scale, zero, offset, ahead, rn, in_n, N, last_group, COUNT, GROUP, RUN, ZERO, OFFSET
            )
        if not ON_ACC:
            scales, zeros, offsets = s_next, z_next, o_next
        acc = _step(
            acc, wp, xp, xsum, scales, zeros, offsets, plane, rm, in_m, K, groups, last_group,
            BITS, PLANES, COUNT, GROUP, RUN, ZERO, OFFSET, CT, ASM, ON_ACC, False,
        )  # fmt: skip
        if ON_ACC:
            scales, zeros, offsets = s_next, z_next, o_next
        wp += UNROLL * lines_of(BITS) * LANE
        xp += UNROLL * S
    acc = _left_over(
        acc, wp, xp, xsum, scale, zero, offset, scales, zeros, offsets, main, stop, rm, rn, in_m, in_n,
        N, K, groups, BITS, PLANES, COUNT, GROUP, ZERO, OFFSET, CT, ASM, ON_ACC, EVEN_K,
    )  # fmt: skip
    if ON_ACC and GROUP == 0:
        row_scale = scales[0].to(tl.float32)
        acc *= row_scale[:, None]
        if (ZERO == 2 or OFFSET) and part == 0:
            sums = tl.load(xsum + rm, mask=in_m, other=0.0)
            acc += shift_of(row_scale, zeros[0], offsets[0], BITS, ZERO, OFFSET)[:, None] * sums[None, :]

    mask = in_n[:, None] & in_m[None, :]
    out = rm[None, :] * N + rn[:, None]
    size = tl.cast(M, tl.int64) * N
    store_parts(y, acc, out, mask, work, arrived, pid, size, PARTS, part)


# -------------------------------------------------------------------------------------------- on the host


def group_sums(x: Tensor, group_size: int) -> Tensor:
    """Sums of x [M, K] over the channels of each group, fp32 [M, G]."""
    m, k = x.shape
    if group_size == -1 or group_size >= k:
        return x.sum(1, keepdim=True, dtype=torch.float32)
    if k % group_size:
        x = torch.nn.functional.pad(x, (0, -k % group_size))
    return x.reshape(m, -1, group_size).sum(-1, dtype=torch.float32)


def forward(x: Tensor, weight: Weight, config: dict, group_size: int) -> Tensor:
    (m, k), n = x.shape, weight.n
    tile, block = forward_tile(config, m), superblock(weight.bits)
    on_acc = tile["ON_ACC"]
    tiles = cdiv(m, tile["BLOCK_M"]) * cdiv(n, tile["BLOCK_N"])
    parts, per_part = forward_split(m, n, k, weight.bits, config)
    y = x.new_empty(m, n)
    work, arrived = workspace(parts, tiles, m * n, x.device)
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
        **options_of(config, on_acc),
    )
    return y


def forward_tile(config: dict, m: int) -> dict:
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
