"""What the forms of grid_gradients do with a tile of dW: put it to 0 where a weight is locked, recompute v
and its code, mask by the clip, sum over the inputs of a group, project the masked gradient on A and B
(gradients_triton.py).

It works on strips of 32 channels, one P16 plane, which no group splits: scale and zero are vectors over rows,
and the fields of a strip have one shift. D comes from grid_triton.low_rank, as in the forward, so the
recomputed codes are the forward's.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid_triton import (
    base_value,
    clipped,
    dot_split,
    grid_value,
    group_row,
    group_values,
    locked,
    low_rank,
    plane_words,
    rank_columns,
    rank_rows,
)
from .scratch import PROJECTION_BLOCK
from .triton_common import LANE


@triton.jit
def project(left, right, total, EXACT: tl.constexpr):
    """total + left @ right in fp32. dW of 16-bit inputs carries an error of 2^-9 or more, to which plain tf32
    (2^-11) adds nothing; EXACT is for fp32 inputs."""
    if EXACT:
        return dot_split(left, right, total)
    else:
        return tl.dot(left, right, total, input_precision="tf32")


@triton.jit
def epilogue(
    dw, strip, rn, row_block, codes, residual, scale0, zero0, a, b, scale, zero, offset, mask, gain, sum_s,
    sum_t, part_a, N, K, codes_row, residual_row, mask_row,
    UNITS_LIVE: tl.constexpr, UNITS_WEIGHT: tl.constexpr, CLIP_FIRST: tl.constexpr, BITS: tl.constexpr,
    LOWEST: tl.constexpr, RESIDUAL_BITS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
    PROJECT: tl.constexpr,
):  # fmt: skip
    """dw fp32 [BLOCK_N, 32], zero outside the matrix, of rows rn and channels 32 * strip and up.

    Writes sum_s, sum_t [strips, N] and, with PROJECT, part_a [row blocks, R, K]; returns the masked gradient
    dD [BLOCK_N, 32].
    """
    HALF: tl.constexpr = (1 << (BITS - 1)) * 1.0
    k0 = strip * LANE
    kk = k0 + tl.arange(0, LANE)
    live = rn < N
    at = group_row(k0, K, GROUP) * N + rn
    if mask is not None:
        dw = tl.where(locked(mask, mask_row, rn, live, k0, K), 0.0, dw)
    words, shift = plane_words(codes, codes_row, rn, live, k0, K, BITS)
    fraction, shift_f = words, shift
    if RESIDUAL_BITS:
        fraction, shift_f = plane_words(residual, residual_row, rn, live, k0, K, RESIDUAL_BITS)
    code = base_value(words, shift, fraction, shift_f, BITS, RESIDUAL_BITS)
    if zero is None:
        z = tl.full((BLOCK_N, 1), HALF, tl.float32)
    else:
        z = group_values(zero, at, live, 0.0)
    masked = dw
    out = strip.to(tl.int64) * N + rn
    if UNITS_LIVE or R > 0:
        delta = None
        if R > 0:
            delta = low_rank(a, b, gain, rn, kk, N, K, R, BLOCK_R, BLOCK_N, LANE)
        value = grid_value(
            code, delta, scale0, zero0, scale, zero, offset, at, live, UNITS_LIVE, UNITS_WEIGHT, BITS
        )
        code, inside = clipped(value, CLIP_FIRST, BITS, LOWEST)
        masked = tl.where(inside, dw, 0.0)
        if UNITS_LIVE:
            # inside q - (v - z) = code - v, formed before the sum: the two sums cancel
            step = tl.where(inside, code - value, code - z)
            tl.store(sum_s + out, tl.sum(dw * step, axis=1), mask=live)
            tl.store(sum_t + out, tl.sum(dw - masked, axis=1), mask=live)
        else:
            factor = group_values(scale, at, live, 0.0)
            if UNITS_WEIGHT:
                factor = tl.div_rn(factor, group_values(scale0, at, live, 1.0))
            masked = masked * factor
    if not UNITS_LIVE:
        tl.store(sum_s + out, tl.sum(dw * (code - z), axis=1), mask=live)
        tl.store(sum_t + out, tl.sum(dw, axis=1), mask=live)
    if R > 0 and PROJECT:
        for r0 in tl.static_range(0, R, BLOCK_R):
            left = rank_rows(b, gain, rn, N, r0, R, BLOCK_R)
            piece = project(tl.trans(left), masked, tl.zeros((BLOCK_R, LANE), tl.float32), EXACT)
            rr = r0 + tl.arange(0, BLOCK_R)
            where = part_a + (row_block.to(tl.int64) * R + rr)[:, None] * K + kk[None, :]
            tl.store(where, piece, mask=(rr < R)[:, None] & (kk < K)[None, :])
    return masked


@triton.jit
def project_b(
    masked, a, kk, K, total, r0: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr
):
    """total + dD A^T over the channels kk, one block of the rank: [BLOCK_N, BLOCK_P]."""
    right = rank_columns(a, kk, K, r0, R, BLOCK_P)
    return project(masked, tl.trans(right), total, EXACT)


@triton.jit
def store_part_b(part_b, piece, slot, rn, r0: tl.constexpr, N, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """part_b [slots, N, R] of one block of the rank."""
    rr = r0 + tl.arange(0, BLOCK_R)
    at = part_b + (slot.to(tl.int64) * N + rn)[:, None] * R + rr[None, :]
    tl.store(at, piece, mask=(rn < N)[:, None] & (rr < R)[None, :])


# -------------------------------------------------------------------------------------------- on the host


class Task(NamedTuple):
    """What a form is given: x [M, K], dy [M, N], the grid as grid_triton.given has it, the table's entry, the
    constants of the kernels, and where the sums over strips go, fp32 [strips, N] each.
    """

    x: Tensor
    dy: Tensor
    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, int, int]
    gain: float
    config: dict[str, Any]
    constants: dict[str, Any]
    sum_s: Tensor
    sum_t: Tensor

    @property
    def rank(self) -> int:
        return self.constants["R"]


def by_group(strips: Tensor, per_group: int) -> Tensor:
    """Sums over the strips of a group, in order: [strips, N] -> [G, N]."""
    if per_group == 1:
        return strips
    short = -strips.shape[0] % per_group
    padded = torch.nn.functional.pad(strips, (0, 0, 0, short)) if short else strips
    return padded.view(-1, per_group, strips.shape[1]).sum(1)


def projection_block(rank: int) -> int:
    """Columns of dB summed together in registers."""
    return min(PROJECTION_BLOCK, max(16, triton.next_power_of_2(rank)))
