"""P16: low-bit codes as planes inside 16-bit half-words.

A weight row of K codes is cut into superblocks of S = 32 * P codes, P = codes per half-word. A superblock is
32 half-words; bit-field p of half-word j holds the code of input channel k = block * S + 32 * p + j. So a
plane (one bit-field of all 32 half-words) is 32 consecutive channels: a group whose size is a multiple of 32
never splits a plane, x needs no permutation, and the same buffer feeds W and W^T tiles. K is padded to S in
storage with code 0; N never is.

    bits        1     2     3     4     6     8
    P          16     8     5     4     8     2      codes per half-word (3 bit: 15 of 16 bits used, 3.2 bits
               per weight; 6 bit: per three half-words)
    S         512   256   160   128   256    64

6 does not divide 16. A superblock of 6 bits is three lines of 32 half-words: the low four bits of planes 0 to
3, those of planes 4 to 7, and the high two bits of all eight, each packed as codes of so many bits are.

Letters in this package: M rows of x, N out features, K in features, g group size, G = ceil(K / g) groups, r
rank. Group tensors (scale, zero, offset) are [G, N]. Codes are unsigned; the weight a code stands for is

    W = scale * (code - zero) + offset          zero = 2^(bits-1) when it is not given (symmetric grid)

computed in fp32 and rounded once to the compute dtype. `dequantize_rows` is the only place where this
happens.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

LANES = 32
PLANES = {1: 16, 2: 8, 3: 5, 4: 4, 6: 8, 8: 2}  # of a superblock
LINES = {bits: 3 if bits == 6 else 1 for bits in PLANES}  # of LANES half-words, that hold them

# Rows of W handled at once by the reference ops: 2^22 elements, 16 MB in fp32, which bounds the transient
# memory of every op and stays near the L2/L3 sizes of current CPUs. The low-rank product is computed per
# chunk, so this constant is part of the reproducibility of codes: changing it may change the order of
# additions in the BLAS call.
CHUNK_ELEMENTS = 1 << 22


def outside_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """An op's implementation with autocast off. Autocast stays on inside a custom op and would run the
    low-rank product in bfloat16 while training, but not while merging: the codes that ship would not be the
    codes that trained."""

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return run


def superblock(bits: int) -> int:
    """Channels per superblock."""
    if bits not in PLANES:
        raise ValueError(f"bits={bits}: P16 packs {sorted(PLANES)} bits")
    return LANES * PLANES[bits]


def packed_width(in_features: int, bits: int) -> int:
    """Half-words per row for K = in_features, superblock padding included."""
    return -(-in_features // superblock(bits)) * LANES * LINES[bits]


def group_count(in_features: int, group_size: int) -> int:
    """G. group_size -1 is one group per row; a last ragged group counts."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def row_chunks(rows: int, in_features: int) -> list[slice]:
    """Slices over N of at most CHUNK_ELEMENTS weights each."""
    step = max(1, CHUNK_ELEMENTS // in_features)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[n, K] integer codes in 0..2^bits-1 -> [n, packed_width] int16."""
    n, k = codes.shape
    if bits == 6:
        padded = torch.nn.functional.pad(codes, (0, -k % superblock(bits)))
        low, high = pack_rows(padded & 15, 4).view(n, -1, 2, LANES), pack_rows(padded >> 4, 2)
        return torch.cat((low, high.view(n, -1, 1, LANES)), 2).view(n, packed_width(k, bits))
    block, planes = superblock(bits), PLANES[bits]
    width = packed_width(k, bits)
    padded = torch.nn.functional.pad(codes, (0, width // LANES * block - k)).view(n, -1, planes, LANES)
    words = padded[:, :, 0].to(torch.int32)
    for plane in range(1, planes):
        words |= padded[:, :, plane].to(torch.int32) << (bits * plane)
    return words.to(torch.int16).view(n, width)


def unpack_rows(packed: Tensor, bits: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """[n, packed_width] int16 -> [n, K] codes in the asked dtype (floats are exact: codes are at most
    255).
    """
    n, planes, mask = packed.shape[0], PLANES[bits], (1 << bits) - 1
    lines = packed.view(n, -1, LINES[bits], LANES)
    out = torch.empty(n, lines.shape[1], planes, LANES, dtype=dtype, device=packed.device)
    for plane in range(planes):
        # int16 >> is arithmetic; the mask drops the sign copies, since bits * (plane + 1) <= 16.
        if bits == 6:
            low = (lines[:, :, plane // 4] >> (plane % 4 * 4)) & 15
            out[:, :, plane] = low.bitwise_or_(((lines[:, :, 2] >> (plane * 2)) & 3) << 4)
        else:
            out[:, :, plane] = (lines[:, :, 0] >> (bits * plane)) & mask
    return out.view(n, -1)[:, :in_features]


def grouped(rows: Tensor, group_size: int) -> Tensor:
    """[n, K] -> [n, G, g], padded with zeros where the last group is ragged (a view when it is not)."""
    n, k = rows.shape
    if group_size == -1 or group_size >= k:
        return rows.reshape(n, 1, k)
    short = -k % group_size
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))
    return rows.reshape(n, -1, group_size)


def ungrouped(groups: Tensor, in_features: int) -> Tensor:
    """[n, G, g] -> [n, K], the inverse of `grouped`."""
    return groups.reshape(groups.shape[0], -1)[:, :in_features]


def per_group(values: Tensor, rows: slice | Tensor) -> Tensor:
    """[G, N] -> fp32 [n, G, 1] of some rows (a slice or their numbers), ready to broadcast against `grouped`
    rows.
    """
    return values[:, rows].t().to(torch.float32).unsqueeze(-1)


def centred(codes: Tensor, zero: Tensor | None, bits: int, rows: slice) -> Tensor:
    """[n, G, g] unsigned codes -> codes minus zero, in place. Exact in fp32."""
    return codes.sub_(float(1 << (bits - 1)) if zero is None else per_group(zero, rows))


def dequantize_rows(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
    rows: slice,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of some rows: [n, K] in dtype. Every forward, backward, merge and export check goes through
    here.
    """
    codes = grouped(unpack_rows(packed[rows], bits, in_features, torch.float32), group_size)
    weight = centred(codes, zero, bits, rows).mul_(per_group(scale, rows))
    if offset is not None:
        weight.add_(per_group(offset, rows))
    return ungrouped(weight, in_features).to(dtype)
