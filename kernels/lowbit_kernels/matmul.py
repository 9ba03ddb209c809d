"""packed_matmul: y = x W^T from packed codes, and its input gradient dX = dY W from the same buffer.

The reference dequantizes a chunk of rows (layout.CHUNK_ELEMENTS weights), rounds it to the dtype of x and
multiplies; no more than one chunk of W exists at a time, and the backward keeps nothing of size N x K.
"""

import torch
from torch import Tensor

from .layout import dequantize_rows, outside_autocast, row_chunks


@torch.library.custom_op("lowbit::packed_matmul", mutates_args=())
@outside_autocast
def packed_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [..., K] times the packed weight [N, K] -> [..., N] in x's dtype.

    codes int16 [N, W] (P16), scale [G, N], zero [G, N] or None, offset [G, N] or None. Differentiable in x
    only; a trained scale or offset goes through `grid_linear`, and asking for its gradient here is an error.
    """
    k = x.shape[-1]
    args = (codes, scale, zero, offset, bits, k, group_size)
    parts = [
        torch.nn.functional.linear(x, dequantize_rows(*args, rows, x.dtype))
        for rows in row_chunks(codes.shape[0], k)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@packed_matmul.register_fake
def _(x, codes, scale, zero, offset, bits, group_size):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("lowbit::packed_matmul_dx", mutates_args=())
@outside_autocast
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
    """dX = dY W. dy [..., N] -> [..., K]; partial sums over chunks of N are kept in fp32."""
    args = (codes, scale, zero, offset, bits, in_features, group_size)
    chunks = row_chunks(codes.shape[0], in_features)
    if len(chunks) == 1:
        return dy @ dequantize_rows(*args, chunks[0], dy.dtype)
    dx = dy.new_zeros(*dy.shape[:-1], in_features, dtype=torch.float32)
    for rows in chunks:
        dx += dy[..., rows] @ dequantize_rows(*args, rows, dy.dtype)
    return dx.to(dy.dtype)


@packed_matmul_dx.register_fake
def _(dy, codes, scale, zero, offset, bits, in_features, group_size):
    return dy.new_empty(*dy.shape[:-1], in_features)


def _setup(ctx, inputs, output):
    x, codes, scale, zero, offset, bits, group_size = inputs
    if scale.requires_grad or (offset is not None and offset.requires_grad):
        raise ValueError("packed_matmul differentiates x only; use grid_linear to train a scale or an offset")
    ctx.save_for_backward(codes, scale, zero, offset)
    ctx.static = (bits, x.shape[-1], group_size)


def _backward(ctx, dy):
    dx = packed_matmul_dx(dy, *ctx.saved_tensors, *ctx.static) if ctx.needs_input_grad[0] else None
    return dx, None, None, None, None, None, None


packed_matmul.register_autograd(_backward, setup_context=_setup)
