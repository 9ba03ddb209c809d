"""packed_matmul, its input gradient and dequantize on a GPU, all from the one packed buffer.

This file chooses the regime; each has its kernel and launcher in a file of its own (matmul_forward_triton.py,
matmul_dx_triton.py, matmul_dequantize_triton.py), over the weight of matmul_weight_triton.py.

Both products are computed transposed, with the weight as the first operand of the tensor core: a plane of 32
channels of BLOCK_N rows is one [BLOCK_N, 32] operand, unpacked in registers (triton_common.py), for y^T = W
x^T; and W^T takes its place for dX^T = W^T dY^T. Three regimes, chosen by the table in configs.json and never
by a search at run time:

    decode      M <= 16. The operand is the integer code - zero, exact in 16 bits; the scale multiplies the
                fp32 accumulator once per group. K is split over programs; the last to arrive adds the parts
                in order: one launch, and the same bits in every run.
    fused       mid M. The operand is the weight itself, rounded to the compute dtype as the reference rounds
                it.
    two_stage   large M. A chunk of the weight is dequantized into a scratch that fits in half of the L2
                cache, and cuBLAS multiplies it. dX takes chunks of channels, not of rows, so that no partial
                sum is ever rounded or re-read.

A zero that is not an integer tensor, or an offset, makes the weight affine: scale * code' + t, code' = code -
2^(bits-1) and t = offset - scale * (zero - 2^(bits-1)). Where the scale is on the accumulator t meets the
sums of x over each group.
"""

import torch
from torch import Tensor

from . import dispatch
from .layout import superblock
from .matmul_dequantize_triton import dequantize_into, dx_two_stage, forward_two_stage
from .matmul_dx_triton import dx_on_chip
from .matmul_forward_triton import forward
from .matmul_weight_triton import Weight
from .triton_common import compute_dtype, rows_of


def packed_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [..., K] times the packed weight [N, K] -> [..., N] in x's dtype. Arguments as the op of this name
    (matmul.py).
    """
    k, n = x.shape[-1], codes.shape[0]
    shape, dtype = (*x.shape[:-1], n), x.dtype
    flat = rows_of(x.detach()).to(compute_dtype(dtype))
    m = flat.shape[0]
    if m == 0 or n == 0:
        return x.new_empty(shape)
    weight = Weight(codes, scale.detach(), zero, offset, bits, k, group_size)
    config = dispatch.config("packed_matmul", bits, dtype, m, n, k)
    if config["regime"] == "two_stage":
        y = forward_two_stage(flat, weight, config)
    else:
        y = forward(flat, weight, config, group_size)
    return y.to(dtype).view(shape)


def packed_matmul_dx(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    """dX = dY W, dy [..., N] -> [..., K] in dy's dtype. Arguments as the op of this name (matmul.py)."""
    n, k = codes.shape[0], in_features
    shape, dtype = (*dy.shape[:-1], k), dy.dtype
    flat = rows_of(dy.detach()).to(compute_dtype(dtype))
    m = flat.shape[0]
    if m == 0 or n == 0:
        return dy.new_zeros(shape)
    weight = Weight(codes, scale.detach(), zero, offset, bits, k, group_size)
    config = dispatch.config("packed_matmul_dx", bits, dtype, m, n, k)
    run = dx_two_stage if config["regime"] == "two_stage" else dx_on_chip
    dx = run(flat, weight, config)
    return dx.to(dtype).view(shape)


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
    """The dense weight [N, K] in dtype, bit for bit the reference's. Arguments as the op of this name
    (pack.py).
    """
    weight = Weight(codes, scale.detach(), zero, offset, bits, in_features, group_size)
    out = torch.empty(weight.n, in_features, dtype=compute_dtype(dtype), device=codes.device)
    if weight.n:
        config = dispatch.config("dequantize", bits, dtype, weight.n, weight.n, in_features)
        dequantize_into(out, weight, 0, 0, -(-in_features // superblock(bits)), config)
    return out.to(dtype)
