"""The cross entropy of tokens, and which positions of a batch are counted.

With z the logits of one position and t its target, loss = logsumexp(z) - z_t and d loss / d z = softmax(z)
- e_t. F.cross_entropy keeps a float32 copy of all logits and its log-softmax; here float32 exists for a few
rows at a time, in the forward and again in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # labels that are not targets
FLOATS_AT_A_TIME = 1 << 22  # float32 elements at a time (16 MB)
CACHED_FLOATS = 1 << 20  # on a CPU, whose cache should hold them from one pass to the next (4 MB)


def row_chunks(logits: Tensor) -> list[slice]:
    """Slices over the rows of logits [T, V] of at most FLOATS_AT_A_TIME numbers (a CPU: CACHED_FLOATS)."""
    real = type(logits) is Tensor  # plan counts by others, for a step on any device
    most = min(FLOATS_AT_A_TIME, CACHED_FLOATS) if real and logits.is_cpu else FLOATS_AT_A_TIME
    step = max(1, most // logits.shape[-1])
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        exact = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(targets.shape, dtype=exact, device=logits.device)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in row_chunks(logits):
            z, t = logits[rows].to(exact), targets[rows]
            lse[rows] = z.logsumexp(-1)
            losses = lse[rows] - z.gather(-1, t.clamp_min(0)[:, None])[:, 0]
            total += losses.masked_fill(t == IGNORE, 0).double().sum()
        ctx.save_for_backward(logits, targets, lse)
        return total.to(exact)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in row_chunks(logits):
            t = targets[rows]
            p = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
            p.scatter_add_(-1, t.clamp_min(0)[:, None], p.new_full((len(t), 1), -1))
            out[rows] = p.mul_(grad).masked_fill_((t == IGNORE)[:, None], 0)
        return out, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        exact = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(targets.shape, dtype=exact, device=logits.device)
        said = torch.empty_like(lse)
        for rows in row_chunks(logits):
            z = logits[rows].to(exact)
            lse[rows] = z.logsumexp(-1)
            said[rows] = z.gather(-1, targets[rows].clamp_min(0)[:, None])[:, 0] - lse[rows]
        ctx.save_for_backward(logits, targets, lse)
        return said.masked_fill_(targets == IGNORE, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in row_chunks(logits):
            t = targets[rows]
            slope = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_().neg_()
            slope.scatter_add_(-1, t.clamp_min(0)[:, None], slope.new_ones((len(t), 1)))
            out[rows] = slope.mul_(grad[rows, None]).masked_fill_((t == IGNORE)[:, None], 0)
        return out, None


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [T, V], targets [T] int64 -> log p of each target [T] in float32 (float64 for float64 logits), 0
    where it is IGNORE; differentiable in logits.
    """
    return _TokenLogProbs.apply(logits, targets)  # pyright: ignore[reportReturnType]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [T, V] (any floating dtype), targets [T] int64, IGNORE where there is none -> sum of the token
    losses, scalar in float32 (float64 for float64 logits).
    """
    return _TokenLoss.apply(logits, targets)  # pyright: ignore[reportReturnType]


def next_tokens(labels: Tensor) -> Tensor:
    """[B, L] labels, not shifted -> [B, L]: what each position is to predict, IGNORE where nothing."""
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    return targets


def within_segments(position_ids: Tensor, used: Tensor | None = None) -> Tensor:
    """bool [B, L]: the positions whose next token is of the same segment and no padding. position_ids [B, L]
    are 0 where a segment starts; used [B]: tokens of each row before the padding; None: rows are full."""
    inside = torch.zeros_like(position_ids, dtype=torch.bool)
    inside[:, :-1] = position_ids[:, 1:] != 0
    if used is not None:
        length = position_ids.shape[1]
        inside &= torch.arange(1, length + 1, device=used.device) < used[:, None]
    return inside


def sequence_numbers(position_ids: Tensor) -> Tensor:
    """[B, L] position_ids, 0 where a segment starts -> int64 [B, L]: which segment of the batch a position is
    of, counted from 0 through all rows; padding is of the row's last one."""
    return ((position_ids == 0).reshape(-1).cumsum(0) - 1).view_as(position_ids)


def pair_count(position_ids: Tensor) -> Tensor:
    """How many pairs of segments a batch [B, L] has, int64, a scalar."""
    return (position_ids == 0).sum() // 2


def in_chosen(position_ids: Tensor, used: Tensor | None = None) -> Tensor:
    """bool [B, L]: the positions of the first segment of each pair that have a next token in it."""
    return within_segments(position_ids, used) & (sequence_numbers(position_ids) % 2 == 0)
