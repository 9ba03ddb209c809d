"""A weight on its grid in registers: base from its codes, low-rank product, value before rounding, mask. What
grid_codes, grid_gradients, grid_row_gradients and quantize_pack share on a GPU.

Train, evaluation and merge must give the same bits, so every float operation is pinned down:
  * D[n, k] is one chain of dot products over the rank in blocks of RANK_BLOCK, ascending, fp32 accumulation,
    never split. RANK_BLOCK is a constant of this file, not of the configuration table.
  * everything after D is the reference's operations in its order, each rounded to nearest: FP_OPTIONS forbids
    contraction to fused multiply-add, division is the IEEE one. Given the same fp32 D the codes are the
    reference's, bit for bit; a dense D is given, so there they always are.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any, overload

import triton
import triton.language as tl
from torch import Tensor

from .grid import GridWeight
from .layout import LANES, PLANES
from .triton_common import LANE, lines_of, round_even

RANK_BLOCK = 32  # at 64 the operands of one product take more registers than a thread has
# v = c + D / s0 must round twice, as the reference does.
FP_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
_MAGIC = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding it rounds half to even and leaves the integer in the low mantissa bits


@triton.constexpr_function
def channels_of(bits):
    """Channels of a superblock; of no use for 0 bits, which have none."""
    return LANES * PLANES[int(bits)] if bits else LANES


@triton.jit
def bit_field(words, shift, BITS: tl.constexpr):
    """Bit fields of P16 half-words, int32. int16 >> is arithmetic after widening; the mask drops the sign
    copies.
    """
    return (words.to(tl.int32) >> shift) & ((1 << BITS) - 1)


@triton.jit
def plane_words(packed, row, source, live_rows, k0, K, BITS: tl.constexpr):
    """The half-words that hold channels k0..k0+31 of the rows `source`, int32 [BLOCK_N, 32], and the shift of
    their fields. Superblocks of base, residual and mask differ in length, so theirs are read again for each
    plane in them (from L1); a plane of padding may lie past the end of the shorter one.
    """
    S: tl.constexpr = channels_of(BITS)
    line = k0 // S * lines_of(BITS) * LANE
    at = packed + source.to(tl.int64)[:, None] * row + (line + tl.arange(0, LANE))[None, :]
    there = live_rows[:, None] & (k0 < K)
    plane = k0 % S // LANE
    if BITS == 6:
        low = tl.load(at + plane // 4 * LANE, mask=there, other=0).to(tl.int32)
        high = tl.load(at + 2 * LANE, mask=there, other=0).to(tl.int32)
        words = bit_field(low, plane % 4 * 4, 4) | (bit_field(high, plane * 2, 2) << 4)
        shift = plane * 0
    else:
        words = tl.load(at, mask=there, other=0).to(tl.int32)
        shift = plane * BITS
    return words, shift


@triton.jit
def locked(mask, row, source, live_rows, k0, K):
    """Which of channels k0..k0+31 of the rows `source` the mask calls zero: bool [BLOCK_N, 32]."""
    words, shift = plane_words(mask, row, source, live_rows, k0, K, 1)
    return bit_field(words, shift, 1) != 0


@triton.jit
def source_rows(rows, rn, live_rows):
    """Where moved rows lie in the weight (GridWeight.place)."""
    if rows is None:
        return rn
    else:
        return tl.load(rows + rn, mask=live_rows, other=0)


@triton.jit
def float_of(field):
    """A non-negative int32 below 2^23 as fp32, exact. Through the mantissa: the conversion unit is 4 to 8
    times slower.
    """
    return (field | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def code_bits(value, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """clip(round_half_even(value), LOWEST, 2^BITS - 1) in the low 22 bits of an int32; the bits above are not
    zero.

    The bounds are integers and rounding is monotone, so clipping first gives the same code and keeps any
    float, however large, inside the range where the magic number rounds.
    """
    inside = tl.minimum(tl.maximum(value, LOWEST * 1.0), ((1 << BITS) - 1) * 1.0)
    return (inside + _MAGIC).to(tl.int32, bitcast=True)


@triton.constexpr_function
def _base_magic(residual_bits):
    """Bits of 2^(22 - f), f = residual_bits: a float whose last mantissa bit is worth 2^-(f + 1)."""
    return (127 + 22 - int(residual_bits)) << 23


@triton.jit
def base_value(words, shift, fraction, shift_f, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr):
    """code + (field + 1/2) / 2^f - 1/2 as fp32, exact, f = RESIDUAL_BITS: the base in unsigned grid units.
    words and fraction are int32 half-words, their fields at the given shifts (fraction is not read when f =
    0: the value is the code).

    One float operation: the sum, in units of 2^-(f + 1), is put together in a mantissa.
    """
    units = ((words << (RESIDUAL_BITS + 1)) >> shift) & (((1 << BITS) - 1) << (RESIDUAL_BITS + 1))
    units |= _base_magic(RESIDUAL_BITS) | 1
    if RESIDUAL_BITS:
        units |= ((fraction << 1) >> shift_f) & (((1 << RESIDUAL_BITS) - 1) << 1)
    return units.to(tl.float32, bitcast=True) - ((1 << (22 - RESIDUAL_BITS)) + 0.5)


@triton.jit
def upper(v):
    """The leading 11 bits of a float, which tf32 holds exactly; v - upper(v) is exact too."""
    return (v.to(tl.int32, bitcast=True) & ~0x1FFF).to(tl.float32, bitcast=True)


@triton.jit
def dot_split(left, right, total):
    """total + left @ right for fp32, by three tensor-core products: about 2^-21 relative, against 2^-10 of
    plain tf32. The CUDA cores would be exact to 2^-24 but take longer than all other work of the layer at
    rank 64. Small terms first. Triton's own "tf32x3" does the same but spends as much again on infinities,
    with which no training survives."""
    left_high, right_high = upper(left), upper(right)
    total = tl.dot(left - left_high, right_high, total, input_precision="tf32")
    total = tl.dot(left_high, right - right_high, total, input_precision="tf32")
    return tl.dot(left_high, right_high, total, input_precision="tf32")


@triton.jit
def rank_rows(b, gain, rn, N, r0: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """gain * B of some rows and one block of the rank, fp32 [BLOCK_N, BLOCK_R]. The gain is on the small
    factor, as in the reference.
    """
    rr = r0 + tl.arange(0, BLOCK_R)
    at = b + rn.to(tl.int64)[:, None] * R + rr[None, :]
    return tl.load(at, mask=(rn < N)[:, None] & (rr < R)[None, :], other=0.0).to(tl.float32) * gain


@triton.jit
def rank_columns(a, kk, K, r0: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """A of one block of the rank and some channels, fp32 [BLOCK_R, len(kk)]."""
    rr = r0 + tl.arange(0, BLOCK_R)
    at = a + rr.to(tl.int64)[:, None] * K + kk[None, :]
    return tl.load(at, mask=(rr < R)[:, None] & (kk < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def low_rank(
    a, b, gain, rn, kk, N, K,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """D = gain * B A of a tile, fp32 [BLOCK_N, WIDTH], in the one order of the file's head."""
    product = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for r0 in tl.static_range(0, R, BLOCK_R):
        left = rank_rows(b, gain, rn, N, r0, R, BLOCK_R)
        right = rank_columns(a, kk, K, r0, R, BLOCK_R)
        product = dot_split(left, right, product)
    return product


@triton.jit
def group_row(k0, K, GROUP: tl.constexpr):
    """Index of the group of channel k0, int64, for offsets into [G, N]; GROUP 0 is one group per row. A plane
    of padding alone may lie past the last group: it reads the last one."""
    if GROUP == 0:
        return tl.zeros((), tl.int64)
    else:
        return (tl.minimum(k0, K - 1) // GROUP).to(tl.int64)


@triton.jit
def group_values(values, at, live_rows, other: tl.constexpr):
    """[BLOCK_N, 1] fp32 of one group. Absent rows read `other`, so that nothing divides by zero there."""
    return tl.load(values + at, mask=live_rows, other=other).to(tl.float32)[:, None]


@triton.jit
def grid_value(
    base, delta, scale0, zero0, scale, zero, offset, at, live_rows,
    UNITS_LIVE: tl.constexpr, UNITS_WEIGHT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """v of codes.py from code + residual and D, both fp32 tiles within one group: the reference's
    operations in its order.
    """
    value = base
    if UNITS_LIVE:
        if zero0 is None:
            value -= (1 << (BITS - 1)) * 1.0
        else:
            value -= group_values(zero0, at, live_rows, 0.0)
        value *= group_values(scale0, at, live_rows, 1.0)
        if delta is not None:
            value += delta
        if offset is not None:
            value -= group_values(offset, at, live_rows, 0.0)
        value = tl.div_rn(value, group_values(scale, at, live_rows, 1.0) + tl.zeros_like(value))
        if zero is None:
            value += (1 << (BITS - 1)) * 1.0
        else:
            value += group_values(zero, at, live_rows, 0.0)
    elif UNITS_WEIGHT:
        unit = group_values(scale0, at, live_rows, 1.0)
        value += delta * tl.div_rn(tl.full(unit.shape, 1.0, tl.float32), unit)
    else:
        value += delta
    return value


@triton.jit
def clipped(value, CLIP_FIRST: tl.constexpr, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """The code of v, fp32, and whether the clip is inactive there (M of grid_linear.py).

    Far values are brought near first: the rounding trick holds below 2^22, and the clip decides the same.
    """
    LOW: tl.constexpr = LOWEST * 1.0
    TOP: tl.constexpr = ((1 << BITS) - 1) * 1.0
    rounded = round_even(tl.minimum(tl.maximum(value, LOW - 1.0), TOP + 1.0))
    if CLIP_FIRST:
        inside = (value >= LOW) & (value <= TOP)
    else:
        inside = (rounded >= LOW) & (rounded <= TOP)
    return tl.minimum(tl.maximum(rounded, LOW), TOP), inside


# -------------------------------------------------------------------------------------------- on the host


def row_dense(tensor: Tensor) -> Tensor:
    """The tensor with a dense last dimension; its row stride may be anything."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@overload
def dense(tensor: Tensor) -> Tensor: ...
@overload
def dense(tensor: Tensor | None) -> Tensor | None: ...
def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps: group tensors and factors are small, a copy costs nothing."""
    return None if tensor is None else tensor.contiguous()


def rank_block(rank: int) -> int:
    """Columns of B per dot product: a power of two, at least what a tensor core takes."""
    return min(RANK_BLOCK, max(16, triton.next_power_of_2(rank)))


def given(
    grid: GridWeight, zero: bool
) -> tuple[tuple[Tensor | None, ...], tuple[int, int, int], dict[str, Any]]:
    """(the tensors of a grid as kernels take them, the row strides of codes, residual and mask, the
    constants).

    Only what the units read is given, and the zero where it is asked for: a value that is not read must not
    ask for another compile.
    """
    low, live = grid.low, grid.live
    codes = row_dense(grid.codes)
    wanted = grid.residual is not None and grid.residual_bits and (low or live or grid.delta is not None)
    residual = row_dense(grid.residual) if grid.residual is not None and wanted else None
    mask = None if grid.mask is None else row_dense(grid.mask)
    rank = grid.a.shape[0] if grid.a is not None and low else 0
    tensors = (
        codes,
        residual,
        dense(grid.scale0),
        dense(grid.zero0) if live else None,
        dense(grid.a) if low else None,
        dense(grid.b) if low else None,
        dense(grid.scale),
        dense(grid.zero) if zero else None,
        dense(grid.offset) if live else None,
        mask,
    )
    constants = {
        "UNITS_LIVE": live,
        "UNITS_WEIGHT": grid.units == "weight",
        "BITS": grid.bits,
        "LOWEST": grid.lowest,
        "RESIDUAL_BITS": grid.residual_bits if residual is not None else 0,
        "R": rank,
        "BLOCK_R": rank_block(rank),
    }
    return tensors, (codes.stride(0), *(0 if t is None else t.stride(0) for t in (residual, mask))), constants
