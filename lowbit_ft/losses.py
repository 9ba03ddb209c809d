"""The training loss: cross entropy of the next token, summed, so that the caller divides by the global count.

With z the logits of one position and t its target, loss = logsumexp(z) - z_t and d loss / d z = softmax(z)
- e_t. Logits are the largest tensor of a step (a window of 2048 tokens x a vocabulary of 128k: 0.5 GB in
bf16), and F.cross_entropy keeps a float32 copy and its log-softmax as well. Here float32 exists for a few
rows at a time, in the forward and again in the backward: what is kept is the logits as they came and one
number per row.

A mean over each micro-batch would weigh tokens of short batches more than tokens of long ones. The sum over
all micro-batches and processes, divided by the count of all their targets, does not, and it makes
accumulation and data parallelism change nothing but the order of a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # labels that are not targets
_CHUNK = 1 << 22  # float32 elements at a time (16 MB)


class _TokenLoss(torch.autograd.Function):
    """logits [T, V] (any floating dtype), targets [T] int64 -> sum of the token losses, float32 scalar."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        lse = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in _row_chunks(logits):
            z, t = logits[rows].float(), targets[rows]
            lse[rows] = z.logsumexp(-1)
            losses = lse[rows] - z.gather(-1, t.clamp_min(0)[:, None])[:, 0]
            total += losses.masked_fill(t == IGNORE, 0).double().sum()
        ctx.save_for_backward(logits, targets, lse)
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            t = targets[rows]
            p = (logits[rows].float() - lse[rows, None]).exp_()
            p.scatter_add_(-1, t.clamp_min(0)[:, None], p.new_full((len(t), 1), -1))
            out[rows] = p.mul_(grad).masked_fill_((t == IGNORE)[:, None], 0)
        return out, None


def _row_chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK // logits.shape[-1])
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the targets of -log p(label), float32 scalar, differentiable in logits.

    logits [B, L, V]; labels [B, L] int64, not shifted: position i of the logits predicts label i + 1;
    labels of -100, and the first of every row, are not targets. Divide by `count_targets` of the whole
    global batch.
    """
    assert logits.shape[:2] == labels.shape, f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    return _TokenLoss.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))  # pyright: ignore


def count_targets(labels: Tensor) -> int:
    """How many labels [B, L] the loss counts."""
    return int((labels[:, 1:] != IGNORE).sum())
