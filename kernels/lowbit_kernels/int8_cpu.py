"""Integer inputs on a CPU: int8 codes of x times int8 codes of the weight, summed in int32, through oneDNN.

What a server with int8 kernels computes. The packed op multiplies x^ with a weight that it dequantizes on
every call; here the codes are kept as signed bytes, and scales are applied to the int32 sums:

    y = s_x * sum over groups of  s_w[group] * (codes of x . (code - zero))    products exact, sums in fp32

With one scale per row that is one product; with groups it is one per group. Against the packed op in float32
the result is the same but for the order of its sums (1e-5); in bfloat16 it is rounded once, at the end.

Measured on AVX512-VNNI, one thread, quantizer included (benchmarks/int8_cpu.py): faster than the packed op at
every shape tried, 1 to 256 rows. Unpacking the codes to bytes on every call is not, so they are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import group_count, unpack_rows

_LONGEST = 1 << 16  # codes of 8 bits whose products an int32 holds the sum of, with one bit to spare


@dataclass(frozen=True)
class Int8Weight:
    """A weight [N, K] as bytes: codes int8 [G, N, group], each group a matrix, scale fp32 [G, N]."""

    codes: Tensor
    scale: Tensor


def has_int8() -> bool:
    """Whether this CPU multiplies bytes into 32 bits in one instruction (VNNI): elsewhere oneDNN may
    saturate in 16 bits, or be slow."""
    return torch.cpu._is_vnni_supported()


def fits_int8(shape: tuple[int, int], bits: int, group_size: int, zero: bool, offset: bool) -> bool:
    """Whether code - zero of this grid is a byte, in whole groups that an int32 holds the sums of."""
    size = shape[1] if group_size == -1 else group_size
    return not offset and not (zero and bits == 8) and shape[1] % size == 0 and size <= _LONGEST


def int8_weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int, group_size: int
) -> Int8Weight:
    """P16 codes [N, W] with scale [G, N] and zero [G, N] | None as bytes; see `fits_int8`."""
    n = codes.shape[0]
    groups = group_count(in_features, group_size)
    assert fits_int8((n, in_features), bits, group_size, zero is not None, False)
    signed = unpack_rows(codes, bits, in_features, torch.int16).view(n, groups, -1)
    signed = signed - ((1 << (bits - 1)) if zero is None else zero.t().to(torch.int16)[..., None])
    return Int8Weight(signed.to(torch.int8).transpose(0, 1).contiguous(), scale.float().contiguous())


def int8_linear(codes: Tensor, scale: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """codes int8 [..., K] with scale fp32 [..., 1] or [1]: x^ = scale codes -> [..., N] in dtype. Not
    differentiable."""
    groups, n, size = weight.codes.shape
    rows = codes.reshape(-1, codes.shape[-1])
    total = torch.empty(0)
    for group in range(groups):
        sums = torch._int_mm(rows[:, group * size : (group + 1) * size], weight.codes[group].t()).float()  # pyright: ignore[reportPrivateImportUsage]
        total = sums.mul_(weight.scale[0]) if group == 0 else total.addcmul_(sums, weight.scale[group])
    return (total.view(*codes.shape[:-1], n) * scale).to(dtype)
