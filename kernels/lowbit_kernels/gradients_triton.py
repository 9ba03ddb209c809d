"""K5/K6: grid_gradients on a GPU: dS, dT, dA, dB from x and dY without keeping anything of size N x K.

Everything behind dW = dY^T X is one epilogue over a tile of dW (gradients_epilogue_triton.py). Three forms,
the first two in gradients_chunked_triton.py, the third in gradients_fused_triton.py:

    chunked   dW of a chunk of rows by the BLAS into scratch, then one pass of the epilogue over it
    blas      the same, but the pass writes dD in the place of dW, and the BLAS projects it too: A and B as
              the sum of two bf16 numbers each (16 bits, as fp32 results need), dD rounded once more to bf16,
              as dW was
    fused     dW accumulates on chip over M and never leaves it

All are deterministic: a group sum and a projection are written as partial sums, each by the one program that
owns it, and added by torch in a fixed order.

Scale-only training with one group per row needs no dW at all: with Yq = X (code - z)^T, one product from
packed codes,

    dS[n] = sum_m dY[m, n] Yq[m, n]        dT[n] = sum_m dY[m, n] sum_k X[m, k]

With smaller groups dT could still be had from a product with K / g columns, but dS needs dW, in whose pass dT
is free. With a mask dT is the sum of a part of dW.
"""

import torch
from torch import Tensor

from . import dispatch
from .gradients_chunked_triton import by_blas, chunked
from .gradients_epilogue_triton import Task, by_group, projection_block
from .gradients_fused_triton import fused
from .grid import GridWeight, flat
from .grid_triton import FP_OPTIONS, given
from .launch import cdiv
from .matmul import packed_matmul
from .scratch import gradient_form
from .triton_common import INTERPRETED, launch_options, plane_group


def _row_scale_gradients(
    x: Tensor, dy: Tensor, codes: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """dS and dT [1, N] of a frozen grid with one group per row (the identity at the file's head)."""
    # A power of two brings the product, whose codes are integers, into the range of fp16 and is taken back
    # exactly.
    unit = torch.full((1, codes.shape[0]), 0.5**bits, device=x.device)
    product = packed_matmul(x, codes, unit, zero, None, bits, -1)
    ds = torch.linalg.vecdot(dy.t().float(), product.t().float()).mul_(2.0**bits)
    dt = dy.t().float() @ x.float().sum(1)
    return ds.unsqueeze(0), dt.unsqueeze(0)


@flat
def grid_gradients(
    x: Tensor, dy: Tensor, grid: GridWeight, group_size: int, clip_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of grid_linear.py: dS, dT [G, N], dA [r, K], dB [N, r], fp32. group_size a multiple of 32 or
    -1.
    """
    (m, k), n = x.shape, grid.codes.shape[0]
    span = plane_group(group_size, k)
    config = dispatch.config("grid_gradients", grid.bits, x.dtype, M=m, N=n, K=k)
    if not grid.low and not grid.live and span == 0 and grid.mask is None:
        ds, dt = _row_scale_gradients(x, dy, grid.codes, grid.zero, grid.bits)
        return ds, dt, *_empty(grid.a, grid.b, x.device)
    tensors, strides, constants = given(grid, zero=True)
    config = gradient_form(config, constants["R"], x.dtype, INTERPRETED, grid.mask is not None)
    constants |= {
        "CLIP_FIRST": clip_first,
        "GROUP": span,
        "BLOCK_P": projection_block(constants["R"]),
        "BLOCK_N": config["BLOCK_N"],
        "EXACT": x.dtype == torch.float32,
        **launch_options(config),
        **FP_OPTIONS,
    }
    strips = cdiv(k, 32)
    sum_s, sum_t = torch.empty(2, strips, n, dtype=torch.float32, device=x.device)
    run = {"fused": fused, "blas": by_blas, "chunked": chunked}[config["form"]]
    da, db = run(Task(x, dy, tensors, strides, grid.gain, config, constants, sum_s, sum_t))
    per_group = strips if span == 0 else span // 32
    ds, dt = by_group(sum_s, per_group), by_group(sum_t, per_group)
    if not grid.low:
        return ds, dt, *_empty(grid.a, grid.b, x.device)
    return ds, dt, da, db.mul_(grid.gain)


def _empty(a: Tensor | None, b: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """dA and dB where there is no low-rank part, as the reference shapes them."""
    return (
        torch.zeros(a.shape if a is not None else (0,), dtype=torch.float32, device=device),
        torch.zeros(b.shape if b is not None else (0,), dtype=torch.float32, device=device),
    )
