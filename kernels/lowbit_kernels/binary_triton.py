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

This file chooses the regime; the kernels are in binary_forward_triton.py and binary_dequantize_triton.py, the
gradients in binary_gradients_triton.py.
"""

import torch
from torch import Tensor

from . import dispatch
from .binary_dequantize_triton import dequantize_into, dequantize_tile
from .binary_forward_triton import decode_kernel, fused_kernel
from .counters import counters
from .launch import cdiv, launch
from .layout import superblock
from .scratch import binary_rows
from .triton_common import (
    COMPUTE,
    compute_dtype,
    plane_group,
    rows_of,
    use_asm,
)


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
    tile = dequantize_tile(dtype, n, n, in_features)
    dequantize_into(out, planes, alpha, offset, in_features, group_size, slice(0, n), 0, tile)
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
        step = min(n, binary_rows(settings.get("CHUNK_MB", 24), k, x.element_size(), 128))
        scratch, tile = x.new_empty(step, k), dequantize_tile(x.dtype, m, n, k)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            weight = scratch[: rows.stop - start]
            dequantize_into(weight, planes, alpha, offset, k, group_size, rows, 0, tile)
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
    step = min(in_features, binary_rows(settings["CHUNK_MB"], n, dy.element_size(), block))
    scratch, tile = dy.new_empty(n * step), dequantize_tile(dy.dtype, m, n, in_features)
    for start in range(0, in_features, step):
        channels = min(step, in_features - start)
        weight = scratch[: n * channels].view(n, channels)
        rows, first = slice(0, n), start // block
        dequantize_into(weight, planes, alpha, offset, in_features, group_size, rows, first, tile)
        torch.mm(flat, weight, out=dx[:, start : start + channels])
    return dx.view(*dy.shape[:-1], in_features)
