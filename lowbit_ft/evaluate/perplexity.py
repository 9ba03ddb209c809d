"""evaluate: loss, perplexity and KL to the full-precision model, the same windows for every stage of a run.

The full-precision reference is walked layer by layer once (model/walk.py); only its final hidden states are
kept, so measuring against it costs one layer of dense memory and its head. Everything is a mean over target
tokens (labels other than -100), summed in float64, so two models with the same weights print the same digits.
Logits exist for some targets at a time, as in the training loss (train/losses.py), and attention needs no
mask (model/attention.py): measuring takes less memory than a step.

    loss = mean -log p(target)     perplexity = exp(loss)     KL = mean sum_v p_fp(v) log(p_fp(v) / p(v))
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..model.attention import segment_attention, segment_inputs, switch
from ..model.checkpoint import Checkpoint
from ..model.linear import packed_op_only
from ..model.walk import Batch, LayerWalk
from ..signals.tokens import IGNORE, row_chunks
from ..train.losses import Targets, target_logits

STAGES = ("base", "quantized", "trained", "merged", "exported")


@dataclass(frozen=True)
class EvalRow:
    """One line of the table. kl is None where there is no reference (or for the reference itself: 0);
    perplexity where tokens are not predicted; tokens: what the loss is a mean over, answers of another task;
    scores: what such a task measures beside the loss, which is None of a reader that computes none.
    """

    stage: str
    loss: float | None
    perplexity: float | None
    kl: float | None
    tokens: int
    scores: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return found if self.scores else {key: found[key] for key in found if key != "scores"}

    @property
    def numbers(self) -> dict[str, float]:
        """What is shown of it, by name, in order."""
        known = {"loss": self.loss, "perplexity": self.perplexity, "KL to base": self.kl}
        return {name: value for name, value in known.items() if value is not None} | self.scores


class Reference:
    """The full-precision model's logits on some batches, without the full-precision model in memory.

    segments: attend segment by segment; the model of these batches was asked (attention.why_not), this one
    has no layers to ask. on_layer: called with the share of the layers that all batches went through, 0 to 1.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: list[Batch],
        *,
        attention: str,
        device: torch.device,
        dtype: torch.dtype,
        segments: bool = False,
        on_layer: Callable[[float], None] | None = None,
    ):
        self.batches = batches
        model = checkpoint.empty_model(attention)
        if segments:
            switch(model.get_decoder())
        self._walk = LayerWalk(model, checkpoint, [_inputs(model, b) for b in batches], device, dtype)
        for index, _, _ in self._walk:
            self._walk.advance(index)
            self._walk.drop(index)
            if on_layer is not None:
                on_layer((index + 1) / len(self._walk.layers))
        self._walk.hand_over(None)
        self._target_logits = target_logits(model)

    def target_logits(self, number: int, targets: Targets) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [r, V] and tokens [r] of batch `number`, some targets at a time (losses.target_logits)."""
        self._walk.hand_over(number)
        return self._target_logits(self._walk.batches[number], targets)

    def row(self) -> EvalRow:
        """The table's line for the full-precision model itself."""
        targets = [Targets(batch["labels"], self._walk.device) for batch in self.batches]
        return _summed(
            "base", (_totals(self.target_logits(i, t), None) for i, t in enumerate(targets)), kl=True
        )


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch], stage: str, reference: Reference | None = None) -> EvalRow:
    """One line of the table. batches: input_ids, labels, position_ids (and masks) [B, L]; the model is left
    in its mode.
    """
    device = (
        next(iter(model.buffers())).device
        if not list(model.parameters())
        else next(model.parameters()).device
    )
    training = model.training
    model.eval()

    def totals() -> Iterable[tuple[float, float, int]]:
        chunks = target_logits(model)
        for number, batch in enumerate(batches):
            inputs = {
                k: v.to(device) if isinstance(v, Tensor) else v for k, v in _inputs(model, batch).items()
            }
            targets = Targets(batch["labels"], device)
            yield _totals(
                chunks(inputs, targets),
                None if reference is None else reference.target_logits(number, targets),
            )

    with (
        packed_op_only(model),
        segment_attention(model),
    ):  # every stage, and windows of few tokens too, on the same path
        row = _summed(stage, totals(), kl=reference is not None)
    model.train(training)
    return row


def _inputs(model: Any, batch: Batch) -> Batch:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return inputs | segment_inputs(model, batch.get("position_ids"))


def _totals(
    ours: Iterator[tuple[Tensor, Tensor]], reference: Iterator[tuple[Tensor, Tensor]] | None
) -> tuple[float, float, int]:
    """(sum of losses, sum of KL, targets) of one batch, from the logits of some targets at a time."""
    loss = kl = count = 0
    for (logits, tokens), (theirs, _) in zip(
        ours, repeat((None, None)) if reference is None else reference, strict=reference is not None
    ):
        for rows in row_chunks(logits):
            target = tokens[rows]
            log_p = torch.log_softmax(logits[rows].float(), dim=-1)
            losses = -log_p.gather(-1, target.clamp_min(0)[:, None])[:, 0]
            loss += losses.masked_fill(target == IGNORE, 0).double().sum()
            count += (target != IGNORE).sum()
            if theirs is not None:
                log_fp = torch.log_softmax(theirs[rows].to(logits.device).float(), dim=-1)
                kl += (log_fp.exp() * (log_fp - log_p)).sum(-1).double().sum()
    return float(loss), float(kl), int(count)


def _summed(stage: str, totals: Iterable[tuple[float, float, int]], kl: bool) -> EvalRow:
    loss = divergence = 0.0
    tokens = 0
    for one_loss, one_kl, count in totals:
        loss, divergence, tokens = loss + one_loss, divergence + one_kl, tokens + count
    if not tokens:
        raise ValueError(
            "evaluation data has no target tokens: nothing to measure (check eval.data and data.train_on)"
        )
    mean = loss / tokens
    return EvalRow(stage, mean, math.exp(min(mean, 700.0)), divergence / tokens if kl else None, tokens)


def table(rows: list[EvalRow]) -> str:
    """The printed table."""
    names = list(dict.fromkeys(name for row in rows for name in row.numbers))
    width = {name: max(len(name) + 4, 12) for name in names}
    lines = [f"{'stage':<12}" + "".join(f"{name:>{width[name]}}" for name in names)]
    for row in rows:
        cells = (f"{row.numbers[name]:.6f}" if name in row.numbers else "" for name in names)
        lines.append(
            f"{row.stage:<12}" + "".join(f"{c:>{width[n]}}" for n, c in zip(names, cells, strict=True))
        )
    return "\n".join(lines)
