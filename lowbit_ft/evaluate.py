"""evaluate: loss, perplexity and KL to the full-precision model, the same windows for every stage of a run.

The full-precision reference is walked layer by layer once (walk.py); only its final hidden states are kept, so measuring
against it costs one layer of dense memory and its head. Everything is a mean over target tokens (labels other than -100), summed
in float64, so two models with the same weights print the same digits.

    loss = mean -log p(target)     perplexity = exp(loss)     KL = mean sum_v p_fp(v) log(p_fp(v) / p(v))
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .linear import packed_op_only
from .load import Checkpoint
from .losses import FLOATS_AT_A_TIME
from .walk import Batch, LayerWalk

STAGES = ("base", "quantized", "trained", "merged", "exported")


@dataclass(frozen=True)
class EvalRow:
    """One line of the table. kl is None where there is no reference (or for the reference itself: 0)."""

    stage: str
    loss: float
    perplexity: float
    kl: float | None
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Reference:
    """The full-precision model's logits on some batches, without the full-precision model in memory."""

    def __init__(self, checkpoint: Checkpoint, batches: list[Batch], *, attention: str, device: torch.device, dtype: torch.dtype):
        self.batches = batches
        model = checkpoint.empty_model(attention)
        self._walk = LayerWalk(model, checkpoint, [_inputs(b) for b in batches], device, dtype)
        for index, _, _ in self._walk:
            self._walk.advance(index)
            self._walk.drop(index)

    def logits(self, number: int) -> Tensor:
        """[B, L, V] of batch `number`."""
        return self._walk.logits(number)

    def row(self) -> EvalRow:
        """The table's line for the full-precision model itself."""
        return _summed("base", (_totals(self.logits(i), batch["labels"], None) for i, batch in enumerate(self.batches)), kl=True)


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch], stage: str, reference: Reference | None = None) -> EvalRow:
    """One line of the table. batches: input_ids, labels, position_ids (and masks) [B, L]; the model is left in its mode."""
    device = next(iter(model.buffers())).device if not list(model.parameters()) else next(model.parameters()).device
    training = model.training
    model.eval()

    def totals() -> Iterable[tuple[float, float, int]]:
        for number, batch in enumerate(batches):
            logits = model(**{k: v.to(device) for k, v in _inputs(batch).items()}, use_cache=False).logits
            yield _totals(logits, batch["labels"], None if reference is None else reference.logits(number))

    with packed_op_only(model):  # windows of few tokens too: every stage is measured on the same path
        row = _summed(stage, totals(), kl=reference is not None)
    model.train(training)
    return row


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def _totals(logits: Tensor, labels: Tensor, reference: Tensor | None) -> tuple[float, float, int]:
    """(sum of losses, sum of KL, targets) of one batch; position t predicts label t + 1. A few positions at a time: the logits of 4096
    tokens of a 128k vocabulary have 2.1 GB in fp32, and this needs several of them."""
    target = labels[:, 1:].to(logits.device)
    chosen = (target != -100).nonzero()
    loss = kl = torch.zeros((), dtype=torch.float64, device=logits.device)
    for at in chosen.split(max(1, FLOATS_AT_A_TIME // logits.shape[-1])):
        where = (at[:, 0], at[:, 1])
        log_p = torch.log_softmax(logits[where].float(), dim=-1)
        loss = loss - log_p.gather(-1, target[where].unsqueeze(-1)).double().sum()
        if reference is not None:
            log_fp = torch.log_softmax(reference[where].to(logits.device).float(), dim=-1)
            kl = kl + (log_fp.exp() * (log_fp - log_p)).sum(-1).double().sum()
    return float(loss), float(kl), len(chosen)


def _summed(stage: str, totals: Iterable[tuple[float, float, int]], kl: bool) -> EvalRow:
    loss = divergence = 0.0
    tokens = 0
    for one_loss, one_kl, count in totals:
        loss, divergence, tokens = loss + one_loss, divergence + one_kl, tokens + count
    if not tokens:
        raise ValueError("evaluation data has no target tokens: nothing to measure (check eval.data and data.train_on)")
    mean = loss / tokens
    return EvalRow(stage, mean, math.exp(min(mean, 700.0)), divergence / tokens if kl else None, tokens)


def table(rows: list[EvalRow]) -> str:
    """The printed table."""
    lines = [f"{'stage':<12}{'loss':>12}{'perplexity':>14}{'KL to base':>14}"]
    for row in rows:
        kl = "" if row.kl is None else f"{row.kl:.6f}"
        lines.append(f"{row.stage:<12}{row.loss:>12.6f}{row.perplexity:>14.6f}{kl:>14}")
    return "\n".join(lines)
