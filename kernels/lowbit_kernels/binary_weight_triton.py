"""Sign planes in registers: half-words, plane scales, and the weight sum_k alpha_k b_k + offset of them."""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import math

import triton
import triton.language as tl

from .layout import LANES, PLANES, superblock
from .triton_common import LANE, fma16, mul16, signs

_FIELDS = PLANES[1]
FIELDS = tl.constexpr(_FIELDS)  # sign fields per half-word
BLOCK = tl.constexpr(superblock(1))  # channels per superblock


@triton.constexpr_function
def run_of(group):
    """Fields in a row that always share a group."""
    return _FIELDS if int(group) == 0 else math.gcd(_FIELDS, int(group) // LANES)


@triton.jit
def words_of(planes, rows, block, N, stride, Q: tl.constexpr):
    """The half-words [rows, 32] of superblock `block`, one tile per plane."""
    lane = tl.arange(0, LANE)
    words = ()
    for k in tl.static_range(Q):
        words = words + (
            tl.load(
                planes + (rows + k * tl.cast(N, tl.int64))[:, None] * stride + block * LANE + lane[None, :]
            ),
        )
    return words


@triton.jit
def alphas_of(alpha, group, rows, N, groups, Q: tl.constexpr):
    """alpha_k of one group, fp32 [rows], one vector per plane."""
    values = ()
    for k in tl.static_range(Q):
        at = tl.cast(k * groups + group, tl.int64) * N + rows
        values = values + (tl.load(alpha + at).to(tl.float32),)
    return values


@triton.jit
def _signed(word, value, FIELD: tl.constexpr):
    """+-value in fp32 by the sign field of `word`: bit 1 is +."""
    bit = (word.to(tl.int32) << (31 - FIELD)) & (-2147483648)
    return ((-value).to(tl.int32, bitcast=True)[:, None] ^ bit).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(words, alphas, offset, FIELD: tl.constexpr, Q: tl.constexpr, OFFSET: tl.constexpr):
    """sum_k alpha_k b_k (+ offset) of one field, fp32 [rows, 32], planes added in order."""
    weight = _signed(words[0], alphas[0], FIELD)
    for k in tl.static_range(1, Q):
        weight += _signed(words[k], alphas[k], FIELD)
    if OFFSET:
        weight += offset[:, None]
    return weight


@triton.jit
def packed_weight_of(
    words, alphas, offset, FIELD: tl.constexpr, Q: tl.constexpr, OFFSET: tl.constexpr, CT: tl.constexpr
):
    """The same in 16 bits, two numbers per instruction, rounded after every plane; for scales that are 16
    bits themselves.
    """
    first = signs(words[0], FIELD, CT, True)
    if OFFSET:
        weight = fma16(first, alphas[0].to(CT)[:, None], offset.to(CT)[:, None], CT, True)
    else:
        weight = mul16(first, alphas[0].to(CT)[:, None], CT, True)
    for k in tl.static_range(1, Q):
        weight = fma16(signs(words[k], FIELD, CT, True), alphas[k].to(CT)[:, None], weight, CT, True)
    return weight


@triton.jit
def x_of(xp, in_m, block, K, FIELD: tl.constexpr, TAIL: tl.constexpr, CT: tl.constexpr):
    """x^T of one field, [32, BLOCK_M]; zeros beyond M and K, whatever lies there."""
    lane = tl.arange(0, LANE)
    mask = in_m[None, :]
    if TAIL:
        mask = mask & (block * BLOCK + FIELD * LANE + lane < K)[:, None]
    return tl.load(xp + FIELD * LANE, mask=mask, other=0.0).to(CT)
