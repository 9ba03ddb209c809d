"""The dense weight, chunk by chunk, and the two_stage regime: a chunk goes into scratch and cuBLAS multiplies
it (matmul_triton.py). dX takes chunks of channels, so that its sums over N are never cut.
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
from .launch import launch
from .layout import superblock
from .matmul_weight_triton import Weight, grid_of, options_of, run_of
from .scratch import COLUMNS, dx_columns, forward_rows
from .triton_common import COMPUTE, LANE, codes_raw, lines_of, place_of, plane_codes, use_asm


@triton.jit(do_not_specialize=["N", "blocks", "first_block", "groups"])
def dequantize_kernel(
    codes, scale, zero, offset, out, N, K, stride_w, stride_o, blocks, first_block, groups,
    BITS: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    CT: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr, SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """out [N, columns of `blocks` superblocks from first_block] = the weight, computed in fp32 and rounded
    once.

    `codes` starts at the first row of the chunk and `SCALE_ROWS` apart are the groups of its (full-height)
    group tensors, which start there too. One program: BLOCK_N rows of one superblock.
    """
    RUN: tl.constexpr = run_of(PLANES, GROUP)
    pid = tl.program_id(0)
    column = pid % blocks
    block = first_block + column
    rn = pid // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    in_n = rn < N
    rows = rn.to(tl.int64)
    words = codes + rows[:, None] * stride_w + block * lines_of(BITS) * LANE + lane[None, :]
    q = tl.load(words, mask=in_n[:, None], other=0)
    high = q
    if BITS == 6:
        high = tl.load(words + 2 * LANE, mask=in_n[:, None], other=0)
    scales, zeros, offsets = grid_of(
        scale, zero, offset, block * PLANES, rn, in_n, SCALE_ROWS, groups - 1,
        PLANES, GROUP, RUN, ZERO, OFFSET,
    )  # fmt: skip
    for plane in tl.static_range(PLANES):
        if BITS == 6 and plane == 4:
            q = tl.load(words + LANE, mask=in_n[:, None], other=0)
        code = plane_codes(q, high, plane, BITS)
        value = codes_raw(code, place_of(BITS, plane), BITS, CT, ASM).to(tl.float32)
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


def dequantize_into(
    out: Tensor, weight: Weight, first_row: int, first_block: int, blocks: int, config: dict
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
        **options_of(config),
    )


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns], each row on a 16-byte boundary, as cuBLAS wants it for its fast paths."""
    padded = -(-columns // 8) * 8
    return like.new_empty(rows, padded)[:, :columns]


def forward_two_stage(x: Tensor, weight: Weight, config: dict) -> Tensor:
    (m, k), n = x.shape, weight.n
    step = forward_rows(n, k, x.element_size(), config)
    tiles = dispatch.config("dequantize", weight.bits, x.dtype, m, n, k)
    scratch = _scratch(step, k, x)
    y = x.new_empty(m, n)
    for first in range(0, n, step):
        chunk = scratch[: min(step, n - first)]
        dequantize_into(chunk, weight, first, 0, -(-k // superblock(weight.bits)), tiles)
        torch.mm(x, chunk.t(), out=y[:, first : first + chunk.shape[0]])
    return y


def dx_two_stage(dy: Tensor, weight: Weight, config: dict) -> Tensor:
    (m, n), k = dy.shape, weight.k
    block = superblock(weight.bits)
    step = dx_columns(n, k, dy.element_size(), weight.bits, config, COLUMNS)
    tiles = dispatch.config("dequantize", weight.bits, dy.dtype, m, n, k)
    scratch = _scratch(n, step, dy)
    dx = dy.new_empty(m, k)
    for first in range(0, k, step):
        chunk = scratch[:, : min(step, k - first)]
        dequantize_into(chunk, weight, 0, first // block, -(-chunk.shape[1] // block), tiles)
        torch.mm(dy, chunk, out=dx[:, first : first + chunk.shape[1]])
    return dx
