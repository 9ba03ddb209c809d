"""GPTQ: round column after column, pushing each rounding error on to the columns not yet rounded (arXiv 2210.17323).

With H = X^T X + damping * mean(diag H) * I over calibration tokens and U the upper Cholesky factor of H^-1, column i:

    q_i  = Q(w_i);    e = (w_i - q_i) / U_ii;    w_j -= e U_ij  for j > i

Columns are taken in their own order (act-order off: groups stay contiguous, so every format can hold the result). A group's
scale and zero are searched when its first column comes up, on the weights as they are by then, with inputs weighted by diag H.
The base's residual is taken from the updated column, which is within the clip of its code, so training starts where GPTQ ended.
"""

import torch
from torch import Tensor

from ..integer import IntGrid
from ..packed import PackedWeight
from .ranges import Stats, search


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (H + damping * mean(diag) * I)^-1, fp32 [K, K]; more damping until H is positive definite.

    fp64, at most three K x K matrices at a time (K = 14336: 4.9 GB).
    """
    h = hessian.to(torch.float64)
    mean = h.diagonal().mean().clamp_min(1e-12)
    added = torch.zeros_like(mean)
    for attempt in range(8):
        wanted = mean * damping * 10**attempt
        h.diagonal().add_(wanted - added)
        added = wanted
        factor, info = torch.linalg.cholesky_ex(h)
        if info.item() == 0:
            inverse = torch.cholesky_inverse(factor)
            del factor
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info.item() == 0:
                return upper.float()
    raise ValueError(f"gptq: the Hessian stays singular with damping {damping * 10**7:g}; give more calibration text")


def gptq(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """weight [N, K], stats.hessian [K, K]. ValueError without a Hessian."""
    if stats.hessian is None:
        raise ValueError("gptq needs calibration text: set quant.calibration.path, or calibrate: mse")
    n, k = weight.shape
    w = weight.to(torch.float32).clone()
    diagonal = stats.hessian.diagonal().float()
    hessian = stats.hessian.clone()  # several linears may share it
    # Inputs that were never active: their weights are rounded alone. Their diagonal is the mean of the others, not 1: damping
    # is relative to the mean diagonal, and activations may be small.
    dead = diagonal == 0
    hessian.diagonal()[dead] = diagonal[~dead].mean() if (~dead).any() else 1.0
    u = inverse_factor(hessian, stats.damping)
    importance = diagonal.clamp_min(diagonal.mean() * 1e-4 + 1e-12)
    group = k if grid.group_size == -1 else grid.group_size
    block = min(group, 256)
    rounded_from, scales, zeros = torch.empty_like(w), [], []
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
        errors = torch.empty(n, stop - start, device=w.device)
        for i in range(start, stop):
            column = w[:, i]
            rounded_from[:, i] = column
            q = ((column / scale + z).round_().clamp_(0, top) - z) * scale
            error = (column - q) / u[i, i]
            w[:, i + 1 : stop] -= error.unsqueeze(1) * u[i, i + 1 : stop].unsqueeze(0)
            errors[:, i - start] = error
        w[:, stop:] -= errors @ u[start:stop, stop:]
    zero = None if grid.symmetric else torch.stack(zeros)
    return PackedWeight.quantize(rounded_from, torch.stack(scales), zero, grid)
