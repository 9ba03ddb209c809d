"""The packed weight in the kernels of matmul: its arguments on the host, its operands in registers.

A plane of 32 channels of some rows is one operand of the tensor core, [rows, 32], unpacked from half-words
(triton_common.py). It is either the integer code - zero, exact in 16 bits (the scale waits for the
accumulator), or the weight itself, rounded to the compute dtype as the reference rounds it.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature. Long lists of arguments stand in lines by kind.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counters import counters
from .layout import LANES, group_count, packed_width
from .triton_common import (
    codes_minus,
    codes_raw,
    codes_symmetric,
    fields,
    fma16,
    launch_options,
    mul16,
    plane_group,
)

# What the zero is: none (symmetric), integers (they go into the unpacking), or any floats.
SYMMETRIC, INTEGER, FLOAT = 0, 1, 2


@triton.constexpr_function
def run_of(bits_fields, group):
    """Planes in a row that always share a group: the tile sees P / run groups per superblock."""
    return int(bits_fields) if int(group) == 0 else math.gcd(int(bits_fields), int(group) // LANES)


@triton.jit
def values_of(
    source,
    plane,
    rows,
    mask,
    N,
    last_group,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    HAVE: tl.constexpr,
):
    """One row vector of `source` [G, N] per run of the COUNT planes from `plane`, as loaded; zeros where
    there is none.
    """
    values = ()
    for run in tl.static_range(COUNT // RUN):
        if not HAVE:
            values = values + (0.0,)
        elif GROUP == 0:
            values = values + (tl.load(source + rows, mask=mask, other=0),)
        else:
            group = tl.minimum((plane + run * RUN) // (GROUP // 32), last_group)
            values = values + (tl.load(source + group * N + rows, mask=mask, other=0),)
    return values


@triton.jit
def grid_of(
    scale, zero, offset, plane, rows, mask, N, last_group,
    COUNT: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """`values_of` scale, zero and offset."""
    scales = values_of(scale, plane, rows, mask, N, last_group, COUNT, GROUP, RUN, True)
    zeros = values_of(zero, plane, rows, mask, N, last_group, COUNT, GROUP, RUN, ZERO != 0)
    offsets = values_of(offset, plane, rows, mask, N, last_group, COUNT, GROUP, RUN, OFFSET)
    return scales, zeros, offsets


@triton.jit
def code_operand(
    q, zero, PLANE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr
):
    """code - zero (integer zero [rows]) or code - 2^(BITS-1), exact."""
    if ZERO == 1:
        return codes_minus(q, zero.to(tl.float32)[:, None], PLANE, BITS, CT, ASM)
    else:
        return codes_symmetric(q, PLANE, BITS, CT, ASM)


@triton.jit
def weight_operand(
    q,
    scale,
    zero,
    offset,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Plane PLANE of the weight, [rows, 32] in CT, from half-words q and the group's values [rows]: rounded
    once to CT.

    A 16-bit scale times an integer of at most 8 bits is exact in fp32, so the packed product is the
    reference's own. An fp32 scale is split in two, which costs one more instruction and keeps the single
    rounding but for ties.
    """
    if ZERO == 2 or OFFSET:
        value = codes_raw(q, PLANE, BITS, CT, ASM).to(tl.float32)
        if ZERO == 0:
            value -= 1 << (BITS - 1)
        else:
            value -= zero.to(tl.float32)[:, None]
        value *= scale.to(tl.float32)[:, None]
        if OFFSET:
            value += offset.to(tl.float32)[:, None]
        return value.to(CT)
    else:
        code = code_operand(q, zero, PLANE, BITS, ZERO, CT, ASM)
        high = scale.to(CT)
        if ASM and scale.dtype == tl.float32:
            low = (scale - high.to(tl.float32)).to(CT)
            return fma16(code, high[:, None], mul16(code, low[:, None], CT, ASM), CT, ASM)
        else:
            return mul16(code, high[:, None], CT, ASM)


@triton.jit
def shift_of(scale, zero, offset, BITS: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """t = offset - scale * (zero - 2^(BITS-1)), fp32 [rows]; the integer zero is in the operand already."""
    t = tl.zeros_like(scale)
    if ZERO == 2:
        t -= scale * (zero.to(tl.float32) - (1 << (BITS - 1)))
    if OFFSET:
        t += offset.to(tl.float32)
    return t


# -------------------------------------------------------------------------------------------- on the host


def _zero_kind(zero: Tensor | None) -> int:
    if zero is None:
        return SYMMETRIC
    return FLOAT if zero.is_floating_point() else INTEGER


class Weight:
    """The packed weight as the kernels take it, and the constants that go with it."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        offset: Tensor | None,
        bits: int,
        k: int,
        group_size: int,
    ):
        n, groups = codes.shape[0], group_count(k, group_size)
        assert codes.dtype == torch.int16 and codes.shape[1] == packed_width(k, bits), (
            codes.shape,
            codes.dtype,
            k,
            bits,
        )
        assert scale.shape == (groups, n), (scale.shape, groups, n)
        self.n, self.k, self.bits, self.groups = n, k, bits, groups
        self.codes = codes if codes.stride(1) == 1 else codes.contiguous()
        self.scale = scale.contiguous()
        self.zero = self.scale if zero is None else zero.contiguous()
        self.offset = self.scale if offset is None else offset.contiguous()
        self.kind, self.affine = _zero_kind(zero), _zero_kind(zero) == FLOAT or offset is not None
        self.constants = {
            "BITS": bits,
            "PLANES": fields(bits),
            "GROUP": plane_group(group_size, k),
            "ZERO": self.kind,
            "OFFSET": offset is not None,
        }

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.zero, self.offset


def options_of(config: dict, fusion: bool = False) -> dict:
    """The launch options of a table entry. Without fusion a multiplication and an addition stay two
    roundings, so that the weight has the reference's bits; the decode regime, whose weight is an integer, may
    contract them."""
    return {**launch_options(config), "enable_fp_fusion": fusion}


def workspace(parts: int, slots: int, size: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if parts == 1:
        return None, None
    return torch.empty(parts * size, dtype=torch.float32, device=device), counters(slots, device)
