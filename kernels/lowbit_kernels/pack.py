"""Ops on codes alone: pack, unpack, quantize_pack, dequantize.

Each op is declared once with torch.library: the reference below is the default implementation (and the fast
CPU path), the fake gives shapes to torch.compile, and a device kernel may be registered on top without
touching a caller.
"""

import torch
from torch import Tensor

from .layout import (
    dequantize_rows,
    grouped,
    pack_rows,
    packed_width,
    per_group,
    row_chunks,
    ungrouped,
    unpack_rows,
)


@torch.library.custom_op("lowbit::pack", mutates_args=())
def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes. codes: uint8 [N, K], each below 2^bits. Returns int16 [N, packed_width(K, bits)] (P16, see
    layout.py).
    """
    return torch.cat([pack_rows(codes[rows], bits) for rows in row_chunks(*codes.shape)])


@pack.register_fake
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(codes.shape[0], packed_width(codes.shape[1], bits), dtype=torch.int16)


@torch.library.custom_op("lowbit::unpack", mutates_args=())
def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack`: int16 [N, W] -> uint8 [N, K]."""
    parts = [
        unpack_rows(packed[rows], bits, in_features, torch.uint8)
        for rows in row_chunks(packed.shape[0], in_features)
    ]
    return torch.cat(parts)


@unpack.register_fake
def _(packed: Tensor, bits: int, in_features: int) -> Tensor:
    return packed.new_empty(packed.shape[0], in_features, dtype=torch.uint8)


@torch.library.custom_op("lowbit::quantize_pack", mutates_args=())
def quantize_pack(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, residual_bits: int
) -> tuple[Tensor, Tensor]:
    """Round a weight onto a given grid and pack it.

    weight [N, K] any float; scale [G, N]; zero [G, N] integers or None (symmetric). With v = weight / scale +
    zero:

        code     = clip(round_half_even(v), 0, 2^bits - 1)
        residual = clip(floor(2^f * (v - code + 1/2)), 0, 2^f - 1)      f = residual_bits in 0, 1, 2, 4

    The residual is the fraction that rounding threw away, mid-rise: it decodes to (residual + 1/2) / 2^f -
    1/2, which lies strictly inside (-1/2, 1/2), so code + decoded residual always rounds back to code and
    never sits on a tie. Returns codes int16 [N, W], residual int16 [N, W_f] (shape [0] when f = 0).
    """
    n, k = weight.shape
    codes, residuals = [], []
    for rows in row_chunks(n, k):
        value = grouped(weight[rows].to(torch.float32), group_size) / per_group(scale, rows)
        value += float(1 << (bits - 1)) if zero is None else per_group(zero, rows)
        code = value.round().clamp_(0, (1 << bits) - 1)
        codes.append(pack_rows(ungrouped(code, k).to(torch.uint8), bits))
        if residual_bits:
            levels = 1 << residual_bits
            fraction = (value - code).add_(0.5).mul_(levels).floor_().clamp_(0, levels - 1)
            residuals.append(pack_rows(ungrouped(fraction, k).to(torch.uint8), residual_bits))
    residual = torch.cat(residuals) if residual_bits else weight.new_empty(0, dtype=torch.int16)
    return torch.cat(codes), residual


@quantize_pack.register_fake
def _(weight, scale, zero, bits, group_size, residual_bits):
    n, k = weight.shape
    shape = (n, packed_width(k, residual_bits)) if residual_bits else (0,)
    return (
        weight.new_empty(n, packed_width(k, bits), dtype=torch.int16),
        weight.new_empty(shape, dtype=torch.int16),
    )


@torch.library.custom_op("lowbit::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """scale * (code - zero) + offset as [N, K] in dtype: the very weight `packed_matmul` multiplies with."""
    n = codes.shape[0]
    args = (codes, scale, zero, offset, bits, in_features, group_size)
    return torch.cat([dequantize_rows(*args, rows, dtype) for rows in row_chunks(n, in_features)])


@dequantize.register_fake
def _(codes, scale, zero, offset, bits, in_features, group_size, dtype):
    return codes.new_empty(codes.shape[0], in_features, dtype=dtype)


def decode_residual(packed: Tensor, residual_bits: int, in_features: int) -> Tensor:
    """Mid-rise residual of some rows in grid units: int16 [n, W_f] -> fp32 [n, K] strictly inside (-1/2,
    1/2).
    """
    levels = 1 << residual_bits
    fraction = unpack_rows(packed, residual_bits, in_features, torch.float32)
    return fraction.add_(0.5).div_(levels).sub_(0.5)
