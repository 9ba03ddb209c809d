"""Decoding on a CPU: one to four rows of x times packed codes of 2, 3 or 4 bits, through PyTorch's own int4
kernel.

The packed op dequantizes a layer on every call, which costs more than the product itself when x has few rows.
`torch._weight_int4pack_mm_for_cpu` multiplies from codes instead, but wants them in a layout of its own:
`int4_weight` repacks once, `int4_linear` multiplies. The kernel reads codes q in 0..15 and computes, in fp32
from bfloat16 numbers,

    W = scale * (q - 8) + shift            y = bf16(sum over K of x W, in fp32)

Every grid up to 4 bits fits without changing a weight:

    2 and 3 bits, symmetric 4 bits     q = code - zero + 8 stays in 0..15          shift = 0
    asymmetric 4 bits                  q = code                                    shift = scale * (8 - zero)

The second shift has up to 11 significant bits, of which a bfloat16 holds 8. What it loses is kept as `rest`
and multiplied with the group sums of x, so the weight is scale * (code - zero) to the last bit here too.

Numerics, against `packed_matmul` in bfloat16: both multiply the same codes and scales, but that op rounds
each weight to bfloat16 first and this one never does, so the results are close and not equal. With u = 2^-8
(one rounding to bfloat16 errs by at most u of its result; here the sum is rounded once, with `rest` twice,
there once), sums over the K inputs and |.| elementwise:

    |int4 - packed| <= u sum|x W| + 3 u |sum x W| + (K 2^-22 + 4 u^2) (sum|x W| + 8 sum|x| scale)

A row of x with a single 1 gives the weight itself, rounded to bfloat16: bit for bit what the packed op
multiplies with (with `rest`, whose result is rounded twice, to the last of its 8 bits).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import unpack_rows

# rows of x; with more the kernel loses to a bf16 GEMM on a dequantized weight (measured: equal at 4, 1.8x
# slower at 16)
DECODE_ROWS = 4
INT4_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Int4Weight:
    """A weight [N, K] as the kernel reads it: packed uint8 (opaque), scale_shift bf16 [G, N, 2], rest fp32
    [G, N] or None.
    """

    packed: Tensor
    scale_shift: Tensor
    rest: Tensor | None
    group_size: int


def fits_int4(
    shape: tuple[int, int], bits: int, group_size: int, scale_dtype: torch.dtype, offset: bool
) -> bool:
    """Whether the kernel can hold a weight [N, K] of this grid: N in whole vectors, whole groups, bfloat16
    scales, no float offset.
    """
    n, k = shape
    whole = n % 16 == 0 and group_size in INT4_GROUPS and k % group_size == 0
    return whole and bits in (2, 3, 4) and scale_dtype == torch.bfloat16 and not offset


def int4_weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int, group_size: int
) -> Int4Weight:
    """Repack P16 codes [N, W] with scale [G, N] and zero [G, N] | None (all on the CPU) for `int4_linear`;
    see `fits_int4`.
    """
    assert fits_int4((codes.shape[0], in_features), bits, group_size, scale.dtype, False)
    q = unpack_rows(codes, bits, in_features, torch.int32)
    middle = 1 << (bits - 1)
    rest, shift = None, torch.zeros_like(scale)
    if zero is None or bits < 4:
        down = middle if zero is None else zero.t().to(torch.int32).repeat_interleave(group_size, dim=1)
        q = q.sub_(down).add_(8)
    else:
        exact = scale.float() * (8 - zero.float())
        shift = exact.to(torch.bfloat16)
        rest = exact - shift.float()
    packed = torch._convert_weight_to_int4pack_for_cpu(q.contiguous(), 1)  # pyright: ignore[reportPrivateImportUsage]
    return Int4Weight(packed, torch.stack([scale, shift], dim=-1).contiguous(), rest, group_size)


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    """x bf16 [..., K] -> bf16 [..., N]. Not differentiable."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch._weight_int4pack_mm_for_cpu(rows, weight.packed, weight.group_size, weight.scale_shift)  # pyright: ignore[reportPrivateImportUsage]
    if weight.rest is not None:
        sums = rows.view(rows.shape[0], -1, weight.group_size).sum(-1, dtype=torch.float32)  # [M, G]
        # In fp32 because a matrix of few rows is two to three times faster so than in bfloat16 (measured on
        # AVX-512).
        y = torch.addmm(y.float(), sums, weight.rest).to(torch.bfloat16)
    return y.view(*x.shape[:-1], y.shape[-1])
