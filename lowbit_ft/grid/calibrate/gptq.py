"""GPTQ: round column after column, pushing each rounding error on to the columns not yet rounded (arXiv
2210.17323).

With H = X^T X + damping * mean(diag H) * I over calibration tokens and U the upper Cholesky factor of H^-1,
column i:

    q_i  = Q(w_i);    e = (w_i - q_i) / U_ii;    w_j -= e U_ij  for j > i

Columns are taken in their own order (act-order off: groups stay contiguous, so every format can hold the
result). A group's scale and zero are searched when its first column comes up, on the weights as they are by
then, with inputs weighted by diag H. The base's residual is taken from the updated column, which is within
the clip of its code, so training starts where GPTQ ended.
"""

import torch
from torch import Tensor

from ..integer import IntGrid
from ..packed import PackedWeight
from .ranges import Stats, search


def inverse_factor(hessian: Tensor, damping: float, diagonal: Tensor | None = None) -> Tensor:
    """Upper Cholesky factor of (H + damping * mean(diag) * I)^-1, fp32 [K, K]; more damping until H is
    positive definite.

    diagonal [K]: instead of H's own. fp64, in one K x K matrix that is worked on in place.
    """
    k, info = len(hessian), torch.empty((), dtype=torch.int32, device=hessian.device)
    h = torch.empty(
        k, k, dtype=torch.float64, device=hessian.device
    ).t()  # by columns, as LAPACK works: no copy inside
    for attempt in range(8):
        h.copy_(hessian)
        if diagonal is not None:
            h.diagonal().copy_(diagonal)
        h.diagonal().add_(h.diagonal().mean().clamp_min(1e-12) * damping * 10**attempt)
        torch.linalg.cholesky_ex(h, out=(h, info))
        if info.item() == 0:
            torch.cholesky_inverse(h, out=h)
            torch.linalg.cholesky_ex(h, upper=True, out=(h, info))
            if info.item() == 0:
                return h.float()
    raise ValueError(
        f"gptq: the Hessian stays singular with damping {damping * 10**7:g}; give more calibration text"
    )


def gptq(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """weight [N, K], stats.hessian [K, K]. ValueError without a Hessian."""
    if stats.hessian is None:
        raise ValueError("gptq needs calibration text: set quant.calibration.path, or calibrate: mse")
    n, k = weight.shape
    w = weight.to(torch.float32, copy=True)
    diagonal = stats.hessian.diagonal().float()
    # Inputs that were never active: their weights are rounded alone. Their diagonal is the mean of the
    # others, not 1: damping is relative to the mean diagonal, and activations may be small.
    dead = diagonal == 0
    alive = diagonal.clone()
    alive[dead] = diagonal[~dead].mean() if (~dead).any() else 1.0
    u = inverse_factor(stats.hessian, stats.damping, alive)
    importance = diagonal.clamp_min(diagonal.mean() * 1e-4 + 1e-12)
    group = k if grid.group_size == -1 else grid.group_size
    block = min(group, 256)
    scales, zeros = [], []
    top, half = grid.levels - 1, float(grid.levels // 2)
    scale = zero = None
    for start in range(0, k, block):
        stop = min(start + block, k)
        if start % group == 0:
            cols = slice(start, min(start + group, k))
            scale, zero = search(w[:, cols], grid, 2.0, importance[cols])
            scales.append(scale)
            zeros.append(zero)
        assert scale is not None
        z = half if zero is None else zero
        columns = w[:, start:stop].t().contiguous()  # a column of w is then a row: neighbours in memory
        errors = torch.empty_like(columns)
        for i, column in enumerate(columns, start):
            q = ((column / scale + z).round_().clamp_(0, top) - z) * scale
            error = (column - q) / u[i, i]
            columns[i + 1 - start :] -= error * u[i, i + 1 : stop].unsqueeze(1)
            errors[i - start] = error
        # What a column was when its turn came: it is not touched any more, and the residual is taken from it.
        w[:, start:stop] = columns.t()
        w[:, stop:] -= errors.t() @ u[start:stop, stop:]
    zero = None if grid.symmetric else torch.stack(zeros)
    return PackedWeight.quantize(w, torch.stack(scales), zero, grid)
