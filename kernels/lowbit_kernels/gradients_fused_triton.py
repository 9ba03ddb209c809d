"""grid_gradients with dW on chip: summed over M in the program that reads it (gradients_triton.py)."""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradients_epilogue_triton import Task, epilogue, project_b, store_part_b
from .grid_triton import row_dense
from .launch import cdiv, launch
from .triton_common import COMPUTE, LANE, compute_dtype


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
    x, dy, codes, residual, scale0, zero0, a, b, scale, zero, offset, mask, gain, sum_s, sum_t, part_a,
    part_b, M, N, K, x_row, dy_row, codes_row, residual_row, mask_row,
    UNITS_LIVE: tl.constexpr, UNITS_WEIGHT: tl.constexpr, CLIP_FIRST: tl.constexpr, BITS: tl.constexpr,
    LOWEST: tl.constexpr, RESIDUAL_BITS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, GROUP_N: tl.constexpr, CT: tl.constexpr, PRODUCT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
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
                pieces[i], strip, rn, row_block, codes, residual, scale0, zero0, a, b, scale, zero, offset,
                mask, gain, sum_s, sum_t, part_a, N, K, codes_row, residual_row, mask_row,
                UNITS_LIVE, UNITS_WEIGHT, CLIP_FIRST, BITS, LOWEST, RESIDUAL_BITS, GROUP, R, BLOCK_R, BLOCK_P,
                BLOCK_N, EXACT, True,
            )  # fmt: skip
            if R > 0:
                columns = strip * LANE + tl.arange(0, LANE)
                sum_b = project_b(masked, a, columns, K, sum_b, 0, R, BLOCK_P, EXACT)
                if R > BLOCK_P:
                    more = project_b(masked, a, columns, K, more, BLOCK_P, R, BLOCK_P, EXACT)
    if R > 0:
        store_part_b(part_b, sum_b, tile, rn, 0, N, R, BLOCK_P)
        if R > BLOCK_P:
            store_part_b(part_b, more, tile, rn, BLOCK_P, N, R, BLOCK_P)


def fused(task: Task) -> tuple[Tensor, Tensor]:
    """dA [r, K] and dB [N, r] without the gain."""
    x, dy, config, rank, sums = row_dense(task.x), row_dense(task.dy), task.config, task.rank, task.sum_s
    (m, k), n = x.shape, dy.shape[1]
    width = config.get("BLOCK_K", 128)
    tiles, row_blocks = cdiv(k, width), cdiv(n, config["BLOCK_N"])
    part_a = sums.new_empty(row_blocks, rank, k)
    part_b = sums.new_empty(tiles, n, rank)
    launch(
        fused_kernel,
        (tiles * row_blocks,),
        x,
        dy,
        *task.tensors,
        task.gain,
        task.sum_s,
        task.sum_t,
        part_a,
        part_b,
        m,
        n,
        k,
        x.stride(0),
        dy.stride(0),
        *task.strides,
        BLOCK_K=width,
        BLOCK_M=config["BLOCK_M"],
        GROUP_N=config.get("GROUP_N", 8),
        CT=COMPUTE[compute_dtype(x.dtype)],
        PRODUCT="ieee" if x.dtype == torch.float32 else "tf32",
        **task.constants,
    )
    return part_a.sum(0), part_b.sum(0)
