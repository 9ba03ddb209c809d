"""grid_gradients with dW made by the BLAS, a chunk of rows at a time, and one pass of the epilogue over it:
the forms chunked and blas (gradients_triton.py).
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradients_epilogue_triton import Task, epilogue, project_b, store_part_b
from .launch import cdiv, launch
from .scratch import gradient_chunk
from .triton_common import LANE


@triton.jit
def chunked_kernel(
    dw, start, rows, codes, residual, scale0, zero0, a, b, scale, zero, offset, mask, gain, sum_s, sum_t,
    part_a, part_b, N, K, codes_row, residual_row, mask_row,
    UNITS_LIVE: tl.constexpr, UNITS_WEIGHT: tl.constexpr, CLIP_FIRST: tl.constexpr, BITS: tl.constexpr,
    LOWEST: tl.constexpr, RESIDUAL_BITS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    EXACT: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
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
        there = (local < rows)[:, None] & (kk < K)[None, :]
        piece = tl.load(dw + local.to(tl.int64)[:, None] * K + kk[None, :], mask=there, other=0.0).to(
            tl.float32
        )
        masked = epilogue(
            piece, strip, rn, row_block, codes, residual, scale0, zero0, a, b, scale, zero, offset, mask,
            gain, sum_s, sum_t, part_a, N, K, codes_row, residual_row, mask_row,
            UNITS_LIVE, UNITS_WEIGHT, CLIP_FIRST, BITS, LOWEST, RESIDUAL_BITS, GROUP, R, BLOCK_R, BLOCK_P,
            BLOCK_N, EXACT, PROJECT,
        )  # fmt: skip
        if R > 0 and not PROJECT:
            tl.store(
                dw + local.to(tl.int64)[:, None] * K + kk[None, :], masked.to(dw.dtype.element_ty), mask=there
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


def chunked(task: Task) -> tuple[Tensor, Tensor]:
    """dA [r, K] and dB [N, r] without the gain, dW chunk by chunk."""
    x, dy, config, rank, sums = task.x, task.dy, task.config, task.rank, task.sum_s
    k, n, block = x.shape[1], dy.shape[1], config["BLOCK_N"]
    # Two blocks of the rank fit in registers next to the tile; a larger rank is written strip by strip.
    strips = len(sums)
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
            *task.tensors,
            task.gain,
            task.sum_s,
            task.sum_t,
            part_a,
            part_b,
            n,
            k,
            *task.strides,
            SPAN=span,
            PROJECT=True,
            **task.constants,
        )
        if rank:
            da += part_a[:blocks].sum(0)
    return da, part_b.sum(0)


def by_blas(task: Task) -> tuple[Tensor, Tensor]:
    """The same; the BLAS projects the masked gradient, which takes the place of dW."""
    x, dy, config, rank, sums = task.x, task.dy, task.config, task.rank, task.sum_s
    k, n = x.shape[1], dy.shape[1]
    a, b = task.tensors[4:6]
    assert a is not None and b is not None  # a rank of 0 takes another form
    rows, span = gradient_chunk(n, k, rank, x.element_size(), config)
    scratch = torch.empty(min(rows, n), k, dtype=x.dtype, device=x.device)
    left, right = (
        _parts_of(b.float() * task.gain, x.dtype, 1),
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
            (cdiv(len(sums), span), cdiv(count, config["BLOCK_N"])),
            dw,
            start,
            count,
            *task.tensors,
            task.gain,
            task.sum_s,
            task.sum_t,
            dw,
            dw,
            n,
            k,
            *task.strides,
            SPAN=span,
            PROJECT=False,
            **task.constants,
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
