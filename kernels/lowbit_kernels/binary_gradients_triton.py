"""Gradients of the plane scales and the offset: sums of dW = dY^T X over groups, weighted with +-1.

Either cuBLAS makes dW chunk by chunk (chunked), or the tile of dW never leaves the chip and its epilogue sums
it (fused; groups of 32, 64, 128). Both write each result once, no atomics: the same bits in every run.
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
from .binary_dequantize_triton import dequantize_tile
from .binary_weight_triton import (
    BLOCK,
    FIELDS,
)
from .launch import cdiv, launch
from .layout import LANES, group_count
from .scratch import binary_rows
from .triton_common import (
    COMPUTE,
    LANE,
    compute_dtype,
    plane_group,
    rows_of,
)


@triton.jit
def group_sums_kernel(
    dw, planes, da, dt, first_row, stop_row, N, K, stride_dw, stride_w, groups, per_group,
    Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    x, dy, planes, da, dt, M, N, K, stride_x, stride_y, stride_w, groups,
    Q: tl.constexpr, GROUP: tl.constexpr, CT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
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
    tile = dequantize_tile(x.dtype, m, n, k)
    step = min(n, binary_rows(chunk, k, x.element_size(), 128))
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
