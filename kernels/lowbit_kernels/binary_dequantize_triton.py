"""The dense weight of sign planes, chunk by chunk into scratch: for cuBLAS (binary_triton.py)."""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .binary_weight_triton import (
    BLOCK,
    FIELDS,
    alphas_of,
    run_of,
    weight_of,
    words_of,
)
from .launch import cdiv, launch
from .layout import superblock
from .triton_common import (
    LANE,
    plane_group,
)


@triton.jit
def dequantize_kernel(
    planes, alpha, offset, out, first_row, stop_row, first_block, N, K, stride_w, stride_out, groups,
    Q: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows first_row..stop_row of W from superblock first_block on, one superblock per program of grid (row
    tiles, blocks), into out, whose [0, 0] is the weight's [first_row, first_block * 512]."""
    RUN: tl.constexpr = run_of(GROUP)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = first_row + rn < stop_row
    rows = tl.minimum(first_row + rn, stop_row - 1).to(tl.int64)
    block = first_block + tl.program_id(1)
    lane = tl.arange(0, LANE)
    words = words_of(planes, rows, block, N, stride_w, Q)
    target = out + rn.to(tl.int64)[:, None] * stride_out + tl.program_id(1) * BLOCK + lane[None, :]
    for run in tl.static_range(FIELDS // RUN):
        group = 0
        if GROUP != 0:
            group = tl.minimum((block * FIELDS + run * RUN) // (GROUP // LANE), groups - 1)
        alphas = alphas_of(alpha, group, rows, N, groups, Q)
        t = alphas[0]
        if OFFSET:
            t = tl.load(offset + tl.cast(group, tl.int64) * N + rows).to(tl.float32)
        for i in tl.static_range(RUN):
            channel = (run * RUN + i) * LANE
            weight = weight_of(words, alphas, t, run * RUN + i, Q, OFFSET)
            mask = in_n[:, None] & (block * BLOCK + channel + lane < K)[None, :]
            tl.store(target + channel, weight.to(out.dtype.element_ty), mask=mask)


def dequantize_into(
    out: Tensor, planes: Tensor, alpha: Tensor, offset: Tensor | None, k: int, group_size: int, rows: slice,
    block: int, warps: dict,
) -> None:  # fmt: skip
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


def dequantize_tile(dtype: torch.dtype, m: int, n: int, k: int) -> dict:
    return dispatch.config("binary_dequantize", 1, dtype, m, n, k)
