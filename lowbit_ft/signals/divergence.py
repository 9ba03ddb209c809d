"""The divergence of a student from its teacher, over rows of logits, with a hand-written backward.

With p and q the teacher's and the student's probabilities of some outcomes, both at temperature T:

    forward    KL(p, q) = sum p (log p - log q)             d / d z_v = (q_v - p_v) / T
    reverse    KL(q, p) = sum q (log q - log p)             d / d z_v = q_v (log q_v - log p_v - KL) / T
    symmetric  the mean of both

times T^2, as is usual: gradients shrink with 1 / T^2 as T grows, and a mix with labels would change its
balance. forward asks for all that the teacher finds likely, reverse for nothing that it finds unlikely.

An outcome is a token or, of a sparse teacher, one of its k tokens or "any other": of that one the masses are
compared, q_rest = 1 - sum q_k, so the sparse divergence is at most the whole one (joining outcomes never
raises a KL) and equal to it at k = V; v among the rest has the gradient of its outcome times q_v / q_rest. A
student whose probabilities are the teacher's has exactly no loss and no gradient in the whole form. Logits
are read in float32 a few rows at a time, in the forward and again in the backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .base import Sparse, Whole
from .tokens import row_chunks

Divergence = Literal["forward", "reverse", "symmetric"]
# Logs of probabilities end here: no fp32 softmax tells e^-100 from nothing, and -inf - -inf is no number.
LEAST = -100.0


def divergence(
    logits: Tensor,
    given: Whole | Sparse,
    counted: Tensor,
    temperature: float = 1.0,
    kind: Divergence = "forward",
) -> Tensor:
    """T^2 times the divergence from the teacher, summed over the positions that are counted: a scalar in fp32
    (fp64 for fp64 logits), differentiable in logits.

    logits [r, V] of the student; given: the teacher's, a Sparse being at this temperature already; counted
    bool [r]. Whole logits of another width (tables padded to another length) are compared over the first
    tokens that both have."""
    if isinstance(given, Sparse):
        return _Divergence.apply(logits, counted, temperature, kind, given.ids, given.log_p, given.rest)  # pyright: ignore
    logits, given = both_have(logits, given)
    return _Divergence.apply(logits, counted, temperature, kind, given.logits)  # pyright: ignore


def both_have(logits: Tensor, given: Whole) -> tuple[Tensor, Whole]:
    """The logits of student and teacher over the first tokens that both have."""
    both = min(logits.shape[-1], given.logits.shape[-1])
    mine = logits if both == logits.shape[-1] else logits[:, :both]
    return mine, given if both == given.logits.shape[-1] else Whole(given.logits[:, :both])


@torch.no_grad()
def most_likely(given: Whole | Sparse, k: int, temperature: float = 1.0) -> Sparse:
    """The k most likely tokens of whole logits, and the mass of the rest, at a temperature; of a sparse
    teacher those of its own, which may be in any order."""
    if isinstance(given, Sparse):
        if k >= given.ids.shape[-1]:
            return given
        top, at = given.log_p.topk(k)
        others = given.log_p.scatter(-1, at, -torch.inf)
        rest = torch.cat([others, given.rest[:, None]], -1).logsumexp(-1)
        return Sparse(given.ids.gather(-1, at), top, rest)
    parts = []
    for rows in row_chunks(given.logits):
        log_p = _log_softmax(given.logits[rows], temperature)
        top, ids = log_p.topk(min(k, log_p.shape[-1]))
        rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        parts.append((ids, top, rest))
    return Sparse(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_cooled(logits, temperature), -1)


def _outcomes(
    logits: Tensor, temperature: float, masses: Tensor, given: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Of some rows: log q and log p of every outcome. masses: of a sparse teacher (`_masses`)."""
    if len(given) == 1:
        log_q = _log_softmax(logits, temperature)
        return log_q, _log_softmax(given[0].to(log_q.dtype), temperature)
    ids, top, rest = given
    named = _cooled(logits.gather(-1, ids), temperature)
    ours = torch.cat([named, masses[:, 1:]], -1) - masses[:, :1]
    return ours, torch.cat([top, rest[:, None]], -1).to(ours.dtype)


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if temperature == 1 else z / temperature


def _masses(logits: Tensor, temperature: float, ids: Tensor) -> Tensor:
    """Of some rows: the logs of what all tokens, and all but those named, sum to before they are divided by
    it, [n, 2]. The second is no difference of the first, which would be lost in rounding when little is left.
    """
    z = _cooled(logits, temperature)
    others = z.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return torch.stack([z.gather(-1, ids).logsumexp(-1).logaddexp(others), others], -1)


def _reverse(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(log q - log p of every outcome, KL(q, p) of every row)."""
    gap = ours.clamp_min(LEAST) - theirs.clamp_min(LEAST)
    return gap, (ours.exp() * gap).sum(-1)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, logits: Tensor, counted: Tensor, temperature: float, kind: Divergence, *given: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        masses = logits.new_empty(len(logits), 2, dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in row_chunks(logits):
            mine = tuple(g[rows] for g in given)
            if len(mine) > 1:
                masses[rows] = _masses(logits[rows], temperature, mine[0])
            ours, theirs = _outcomes(logits[rows], temperature, masses[rows], mine)
            value = ours.new_zeros(len(ours))
            if kind != "reverse":
                gap = theirs.clamp_min(LEAST) - ours.clamp_min(LEAST)
                value = (theirs.exp() * gap).sum(-1)
            if kind != "forward":
                value = value + _reverse(ours, theirs)[1]
            total += value.masked_fill_(~counted[rows], 0).double().sum()
        ctx.save_for_backward(logits, counted, masses, *given)
        ctx.how = (temperature, kind)
        factor = temperature**2 * (0.5 if kind == "symmetric" else 1.0)
        return (total * factor).to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, counted, masses, *given = ctx.saved_tensors
        temperature, kind = ctx.how
        factor = temperature * (0.5 if kind == "symmetric" else 1.0)
        out = torch.empty_like(logits)
        for rows in row_chunks(logits):
            mine = tuple(g[rows] for g in given)
            ours, theirs = _outcomes(logits[rows], temperature, masses[rows], mine)
            slope = torch.zeros_like(ours)  # of every outcome's own logit
            if kind != "reverse":
                slope += ours.exp() - theirs.exp()
            if kind != "forward":
                gap, value = _reverse(ours, theirs)
                slope += ours.exp() * (gap - value[:, None])
            slope.mul_(grad * factor)
            if len(mine) > 1:  # the slope of the rest by the share each token has of it
                rest = masses[rows, 1:].clamp_min(torch.finfo(masses.dtype).min)  # -inf: none is left
                share = (_cooled(logits[rows], temperature) - rest).exp_()
                slope = share.mul_(slope[:, -1:]).scatter_(-1, mine[0], slope[:, :-1])
            out[rows] = slope.masked_fill_(~counted[rows, None], 0).to(out.dtype)
        return (out, None, None, None, *([None] * len(given)))


__all__ = ["LEAST", "Divergence", "Sparse", "Whole", "both_have", "divergence", "most_likely"]
