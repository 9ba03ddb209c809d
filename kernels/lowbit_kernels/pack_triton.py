"""K9: quantize_pack, pack and unpack on a GPU. Bandwidth-bound: every input is read once, every output
written once.

A program owns BLOCK_N rows and a span of whole superblocks; planes (32 channels) are the unit of loads, so a
half-word is built in a register and stored when its last plane is in. quantize_pack writes codes and
residual, whose superblocks differ in length, from one read of the weight: its span is their least common
multiple. Only 3 bit with a 1- or 2-bit residual would need a span of 1280 and more channels; there the two
outputs are made by two launches.

Operations and their order are the reference's (pack.py), with IEEE division and no contraction, so the bits
are the reference's.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .grid_triton import (
    FP_OPTIONS,
    bit_field,
    channels_of,
    code_bits,
    dense,
    float_of,
    group_row,
    group_values,
    row_dense,
)
from .launch import cdiv, launch
from .layout import packed_width, superblock
from .triton_common import LANE, launch_options, lines_of, place_of, plane_codes, plane_group

# Planes one program may unroll; above it quantize_pack makes codes and residual in two launches.
_MOST_PLANES = 24


@triton.jit
def quantize_pack_kernel(
    weight,
    scale,
    zero,
    codes,
    residual,
    N,
    K,
    weight_row,
    W,
    WF,
    PLANES: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (spans of PLANES * 32 channels, row blocks). codes [N, W], residual [N, WF] dense; None is not
    written.
    """
    PER: tl.constexpr = channels_of(BITS) // 32
    PER_F: tl.constexpr = channels_of(RESIDUAL_BITS) // 32
    LEVELS: tl.constexpr = 1 << RESIDUAL_BITS
    first = tl.program_id(0) * PLANES  # plane index in the row; spans start at a superblock of both outputs
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    live = rn < N
    rows = rn.to(tl.int64)[:, None]
    word = tl.zeros((BLOCK_N, LANE), tl.int32)
    high = word
    rest = tl.zeros((BLOCK_N, LANE), tl.int32)
    for p in tl.static_range(PLANES):
        k0 = (first + p) * 32
        kk = k0 + lane
        mask = live[:, None] & (kk < K)[None, :]
        value = tl.load(weight + rows * weight_row + kk[None, :], mask=mask, other=0.0).to(tl.float32)
        at = group_row(k0, K, GROUP) * N + rn
        value = tl.div_rn(value, group_values(scale, at, live, 1.0) + tl.zeros_like(value))
        if zero is None:
            value += (1 << (BITS - 1)) * 1.0
        else:
            value += group_values(zero, at, live, 0.0)
        code = code_bits(value, BITS, 0) & ((1 << BITS) - 1)
        if codes is not None and BITS == 6:
            kept = tl.where(mask, code, 0)
            word |= (kept & 15) << (p % 4 * 4)
            high |= (kept >> 4) << (p % PER * 2)
            if p % 4 == 3:
                half = ((first + p) // PER * 3 + p % PER // 4) * LANE + lane
                there = live[:, None] & (half < W)[None, :]
                tl.store(codes + rows * W + half[None, :], word.to(tl.int16), mask=there)
                word = tl.zeros((BLOCK_N, LANE), tl.int32)
            if p % PER == PER - 1:
                half = ((first + p) // PER * 3 + 2) * LANE + lane
                there = live[:, None] & (half < W)[None, :]
                tl.store(codes + rows * W + half[None, :], high.to(tl.int16), mask=there)
                high = tl.zeros((BLOCK_N, LANE), tl.int32)
        elif codes is not None:
            word |= tl.where(mask, code, 0) << (BITS * (p % PER))
            if p % PER == PER - 1:
                half = (first + p) // PER * LANE + lane
                tl.store(
                    codes + rows * W + half[None, :],
                    word.to(tl.int16),
                    mask=live[:, None] & (half < W)[None, :],
                )
                word = tl.zeros((BLOCK_N, LANE), tl.int32)
        if residual is not None:
            # floor of a non-negative float is the integer conversion; the clip comes first, as everywhere.
            fraction = ((value - float_of(code)) + 0.5) * LEVELS
            field = tl.minimum(tl.maximum(fraction, 0.0), LEVELS - 0.5).to(tl.int32)
            rest |= tl.where(mask, field, 0) << (RESIDUAL_BITS * (p % PER_F))
            if p % PER_F == PER_F - 1:
                half = (first + p) // PER_F * LANE + lane
                tl.store(
                    residual + rows * WF + half[None, :],
                    rest.to(tl.int16),
                    mask=live[:, None] & (half < WF)[None, :],
                )
                rest = tl.zeros((BLOCK_N, LANE), tl.int32)


@triton.jit
def pack_kernel(codes, out, N, K, codes_row, W, BITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """uint8 [N, K] -> int16 [N, W]. Grid (superblocks, row blocks)."""
    PER: tl.constexpr = channels_of(BITS) // 32
    block = tl.program_id(0)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    live = (rn < N)[:, None]
    rows = rn.to(tl.int64)[:, None]
    word = tl.zeros((BLOCK_N, LANE), tl.int32)
    high = word
    to = out + rows * W + (block * lines_of(BITS) * LANE + lane)[None, :]
    for p in tl.static_range(PER):
        kk = block * (PER * 32) + 32 * p + lane
        code = tl.load(codes + rows * codes_row + kk[None, :], mask=live & (kk < K)[None, :], other=0)
        if BITS == 6:
            word |= (code.to(tl.int32) & 15) << (p % 4 * 4)
            high |= (code.to(tl.int32) >> 4) << (p * 2)
            if p == 3:
                tl.store(to, word.to(tl.int16), mask=live)
                word = tl.zeros((BLOCK_N, LANE), tl.int32)
        else:
            word |= code.to(tl.int32) << (BITS * p)
    if BITS == 6:
        tl.store(to + LANE, word.to(tl.int16), mask=live)
        tl.store(to + 2 * LANE, high.to(tl.int16), mask=live)
    else:
        tl.store(to, word.to(tl.int16), mask=live)


@triton.jit
def unpack_kernel(packed, out, N, K, packed_row, BITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """int16 [N, W] -> uint8 [N, K]. Grid (superblocks that hold channels below K, row blocks)."""
    PER: tl.constexpr = channels_of(BITS) // 32
    block = tl.program_id(0)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    live = (rn < N)[:, None]
    rows = rn.to(tl.int64)[:, None]
    at = packed + rows * packed_row + (block * lines_of(BITS) * LANE + lane)[None, :]
    word = tl.load(at, mask=live, other=0)
    high = word
    if BITS == 6:
        high = tl.load(at + 2 * LANE, mask=live, other=0)
    for p in tl.static_range(PER):
        kk = block * (PER * 32) + 32 * p + lane
        if BITS == 6 and p == 4:
            word = tl.load(at + LANE, mask=live, other=0)
        code = bit_field(plane_codes(word, high, p, BITS), BITS * place_of(BITS, p), BITS).to(tl.uint8)
        tl.store(out + rows * K + kk[None, :], code, mask=live & (kk < K)[None, :])


# -------------------------------------------------------------------------------------------------- launchers


def _options(config: dict) -> dict:
    return {"BLOCK_N": config["BLOCK_N"], **launch_options(config)}


def quantize_pack(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, residual_bits: int
) -> tuple[Tensor, Tensor]:
    """The op of pack.py: codes int16 [N, W] and residual int16 [N, W_f] ([0] without one); group_size a
    multiple of 32 or -1.
    """
    (n, k), span = weight.shape, plane_group(group_size, weight.shape[1])
    weight = row_dense(weight)
    scale, zero = dense(scale), dense(zero)
    codes = torch.empty(n, packed_width(k, bits), dtype=torch.int16, device=weight.device)
    shape = (n, packed_width(k, residual_bits)) if residual_bits else (0,)
    residual = torch.empty(shape, dtype=torch.int16, device=weight.device)
    planes = superblock(bits) // 32
    parts: list[tuple[Tensor | None, Tensor | None, int]] = [(codes, None, planes)]
    if residual_bits:
        fine = superblock(residual_bits) // 32
        both = math.lcm(planes, fine)
        parts = [(codes, residual, both)] if both <= _MOST_PLANES else [*parts, (None, residual, fine)]
    options = _options(dispatch.config("quantize_pack", bits, weight.dtype, M=1, N=n, K=k))
    for coarse, rest, count in parts:
        grid = (cdiv(k, 32 * count), cdiv(n, options["BLOCK_N"]))
        launch(
            quantize_pack_kernel,
            grid,
            weight,
            scale,
            zero,
            coarse,
            rest,
            n,
            k,
            weight.stride(0),
            codes.shape[1],
            residual.shape[-1],
            PLANES=count,
            BITS=bits,
            RESIDUAL_BITS=residual_bits,
            GROUP=span,
            **options,
            **FP_OPTIONS,
        )
    return codes, residual


def pack(codes: Tensor, bits: int) -> Tensor:
    """The op of pack.py: uint8 [N, K], each below 2^bits -> int16 [N, W]."""
    n, k = codes.shape
    codes = row_dense(codes)
    out = torch.empty(n, packed_width(k, bits), dtype=torch.int16, device=codes.device)
    options = _options(dispatch.config("pack", bits, torch.float32, M=1, N=n, K=k))
    grid = (cdiv(k, superblock(bits)), cdiv(n, options["BLOCK_N"]))
    launch(pack_kernel, grid, codes, out, n, k, codes.stride(0), out.shape[1], BITS=bits, **options)
    return out


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The op of pack.py: int16 [N, W] -> uint8 [N, K]."""
    n = packed.shape[0]
    packed = row_dense(packed)
    out = torch.empty(n, in_features, dtype=torch.uint8, device=packed.device)
    options = _options(dispatch.config("unpack", bits, torch.float32, M=1, N=n, K=in_features))
    grid = (cdiv(in_features, superblock(bits)), cdiv(n, options["BLOCK_N"]))
    launch(unpack_kernel, grid, packed, out, n, in_features, packed.stride(0), BITS=bits, **options)
    return out


# ----------------------------------------------------------------------------------------------- what we ship

_PACK_SIZES = dict.fromkeys(("N", "K"), "i32")


def _case(bits: int, residual_bits: int, asymmetric: bool) -> tuple:
    planes = (
        superblock(bits) // 32
        if not residual_bits
        else math.lcm(superblock(bits), superblock(residual_bits)) // 32
    )
    pointers = {"weight": "*bf16", "scale": "*bf16", "codes": "*i16"}
    if residual_bits:
        pointers["residual"] = "*i16"
    if asymmetric:
        pointers["zero"] = "*u8"
    absent = {name: None for name in ("residual", "zero") if name not in pointers}
    config = dispatch.packaged("quantize_pack", bits, torch.bfloat16, 1, 4096, 4096, 80)
    constants = absent | {
        "PLANES": planes,
        "BITS": bits,
        "RESIDUAL_BITS": residual_bits,
        "GROUP": 128,
        "BLOCK_N": config["BLOCK_N"],
    }
    sizes = _PACK_SIZES | dict.fromkeys(("weight_row", "W", "WF"), "i32")
    name = f"quantize-pack-{bits}bit-f{residual_bits}{'-zero' if asymmetric else ''}"
    return name, quantize_pack_kernel, pointers | sizes, constants, launch_options(config) | FP_OPTIONS, None


def _plain_case(op: str, kernel: Any, pointers: dict, bits: int) -> tuple:
    config = dispatch.packaged(op, bits, torch.float32, 1, 4096, 4096, 80)
    constants = {"BITS": bits, "BLOCK_N": config["BLOCK_N"]}
    return f"{op}-{bits}bit", kernel, pointers | _PACK_SIZES, constants, launch_options(config), None


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles."""
    into = {"codes": "*u8", "out": "*i16", "codes_row": "i32", "W": "i32"}
    back = {"packed": "*i16", "out": "*u8", "packed_row": "i32"}
    return [
        _case(4, 4, False),
        _case(4, 4, True),
        _case(4, 0, False),
        _case(3, 4, False),
        _case(6, 4, False),
        _case(2, 1, True),
        *(_plain_case("pack", pack_kernel, into, bits) for bits in (4, 6)),
        *(_plain_case("unpack", unpack_kernel, back, bits) for bits in (4, 6)),
    ]
