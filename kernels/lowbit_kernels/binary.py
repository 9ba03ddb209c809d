"""binary_matmul: y = x W^T with W = sum_k alpha_k b_k + offset, b_k in {-1, +1} stored as sign planes.

Binary-coding quantization as AlphaTuning trains it (arXiv 2210.03858, Eq. 1-4): the bits are frozen and
shared by all tasks, the plane scales alpha [q, G, N] carry a task. No rounding, so no straight-through: with
dW = dY^T X, sums over a group,

    dalpha_k = sum dW b_k        doffset = sum dW        dX = dY W

Bit 1 means +1, bit 0 means -1. planes: int16 [q, N, packed_width(K, 1)]. Nothing of size N x K is saved for
backward.
"""

import torch
from torch import Tensor

from .layout import grouped, outside_autocast, per_group, row_chunks, ungrouped, unpack_rows


def _signs(plane: Tensor, rows: slice, in_features: int, group_size: int) -> Tensor:
    """+-1 of some rows of one plane, fp32 [n, G, g] (pads are arbitrary)."""
    return grouped(unpack_rows(plane[rows], 1, in_features, torch.float32).mul_(2).sub_(1), group_size)


def binary_rows(
    planes: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    rows: slice,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of some rows, [n, K]: planes added in order in fp32, rounded once to dtype."""
    weight = _signs(planes[0], rows, in_features, group_size).mul_(per_group(alpha[0], rows))
    for k in range(1, planes.shape[0]):
        weight.add_(_signs(planes[k], rows, in_features, group_size).mul_(per_group(alpha[k], rows)))
    if offset is not None:
        weight.add_(per_group(offset, rows))
    return ungrouped(weight, in_features).to(dtype)


@torch.library.custom_op("lowbit::binary_dequantize", mutates_args=())
def binary_dequantize(
    planes: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [N, K] in dtype: the very one `binary_matmul` multiplies with."""
    chunks = row_chunks(planes.shape[1], in_features)
    return torch.cat(
        [binary_rows(planes, alpha, offset, in_features, group_size, rows, dtype) for rows in chunks]
    )


@binary_dequantize.register_fake
def _(planes, alpha, offset, in_features, group_size, dtype):
    return planes.new_empty(planes.shape[1], in_features, dtype=dtype)


@torch.library.custom_op("lowbit::binary_matmul", mutates_args=())
@outside_autocast
def binary_matmul(x: Tensor, planes: Tensor, alpha: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype. Differentiable in x, alpha [q, G, N] and offset [G, N]."""
    k = x.shape[-1]
    parts = [
        torch.nn.functional.linear(x, binary_rows(planes, alpha, offset, k, group_size, rows, x.dtype))
        for rows in row_chunks(planes.shape[1], k)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@binary_matmul.register_fake
def _(x, planes, alpha, offset, group_size):
    return x.new_empty(*x.shape[:-1], planes.shape[1])


@torch.library.custom_op("lowbit::binary_matmul_dx", mutates_args=())
@outside_autocast
def binary_matmul_dx(
    dy: Tensor, planes: Tensor, alpha: Tensor, offset: Tensor | None, in_features: int, group_size: int
) -> Tensor:
    """dX = dY W, dy [..., N] -> [..., K]; partial sums over chunks of N are kept in fp32."""
    dx = dy.new_zeros(*dy.shape[:-1], in_features, dtype=torch.float32)
    for rows in row_chunks(planes.shape[1], in_features):
        dx += dy[..., rows] @ binary_rows(planes, alpha, offset, in_features, group_size, rows, dy.dtype)
    return dx.to(dy.dtype)


@binary_matmul_dx.register_fake
def _(dy, planes, alpha, offset, in_features, group_size):
    return dy.new_empty(*dy.shape[:-1], in_features)


@torch.library.custom_op("lowbit::binary_gradients", mutates_args=())
@outside_autocast
def binary_gradients(
    x: Tensor, dy: Tensor, planes: Tensor, group_size: int, trained: int
) -> tuple[Tensor, Tensor]:
    """dalpha [trained, G, N] of the first `trained` planes and doffset [G, N], fp32, from x [M, K] and dy [M,
    N].
    """
    (q, n), k = planes.shape[:2], x.shape[-1]
    assert 0 <= trained <= q
    groups = 1 if group_size == -1 else -(-k // group_size)
    da = torch.empty(trained, groups, n, dtype=torch.float32, device=x.device)
    dt = torch.empty(groups, n, dtype=torch.float32, device=x.device)
    for rows in row_chunks(n, k):
        dw = grouped((dy[:, rows].t() @ x).float(), group_size)
        dt[:, rows] = dw.sum(-1).t()
        for plane in range(trained):
            da[plane, :, rows] = (dw * _signs(planes[plane], rows, k, group_size)).sum(-1).t()
    return da, dt


@binary_gradients.register_fake
def _(x, dy, planes, group_size, trained):
    k = x.shape[-1]
    groups = 1 if group_size == -1 else -(-k // group_size)
    return (
        x.new_empty(trained, groups, planes.shape[1], dtype=torch.float32),
        x.new_empty(groups, planes.shape[1], dtype=torch.float32),
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.group_size = inputs[4]


def _backward(ctx, dy):
    x, planes, alpha, offset = ctx.saved_tensors
    need, k, group_size = ctx.needs_input_grad, x.shape[-1], ctx.group_size
    dx = da = dt = None
    if need[0]:
        dx = binary_matmul_dx(dy, planes, alpha, offset, k, group_size)
    if need[2] or need[3]:
        flat = (x.reshape(-1, k), dy.reshape(-1, dy.shape[-1]))
        da, dt = binary_gradients(*flat, planes, group_size, planes.shape[0] if need[2] else 0)
        da = da.to(alpha.dtype) if need[2] else None
        dt = dt.to(offset.dtype) if need[3] and offset is not None else None
    return dx, None, da, dt, None


binary_matmul.register_autograd(_backward, setup_context=_setup)
