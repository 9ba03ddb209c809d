"""The training loss: sums over positions of what the signal says (signals/), so that the caller divides by
global counts.

Logits are the largest tensor of a step (4096 tokens x a vocabulary of 128k: 1.1 GB in bf16, and as much again
for their gradient). So

    hidden states [T, H] -> chunks of rows -> logits of one chunk -> its sums

runs chunk by chunk, and again in the backward, as gradient checkpointing does: the logits of one chunk are
all that ever exists, for one more product with the head per step (model/heads.py takes the head off). A
teacher that answers in logits keeps its hidden states, and makes those of a chunk beside the student's.
`loss_forward` makes that of a model; where its head cannot be taken off, the logits are made whole, and a
warning says so. Positions that nothing counts (prompts, padding) have no logits at all: a chunk is a stretch
of the hidden states with so many positions in it, and which ones they are is read off the labels while these
are on the CPU (`Targets`), so that the device is never asked.

A mean over each micro-batch would weigh tokens of short batches more than tokens of long ones. The sum over
all micro-batches and processes, divided by the count of all their positions, does not, and it makes
accumulation and data parallelism change nothing but the order of a sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model import heads
from ..model.heads import Answering, Head, find_head
from ..model.upload import upload
from ..signals import SIGNALS, Ask, Lesson
from ..signals.base import Answers, Looked
from ..signals.tokens import IGNORE, in_chosen, next_tokens, pair_count, token_loss, within_segments
from .liger import Fused, liger_loss, liger_problems

LABELS = Lesson(SIGNALS["labels"], None)


def measure_of(lesson: Lesson) -> Lesson:
    """What is measured of a run: the labels, whatever it learns from; of one that learns from pairs, that."""
    return lesson if lesson.signal.pairs else LABELS


@dataclass(frozen=True)
class Loss:
    """A choice of train.loss. fuse(model, logits_of) -> the loss of training, for a model whose logits are
    logits_of(hidden [T, H]) -> [T, V]; None: the chunks. What is measured is always the cross entropy.
    problems(recipe): what it lacks in this recipe or on this machine.
    """

    fuse: Callable[[Any, Callable[[Tensor], Tensor]], Fused] | None = None
    problems: Callable[[Any], list[str]] = lambda recipe: []


LOSSES: dict[str, Loss] = {"chunked": Loss(), "liger": Loss(liger_loss, liger_problems)}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the targets of -log p(label), scalar in float32 (or float64), differentiable in logits.

    logits [B, L, V]; labels [B, L] int64, not shifted: position i of the logits predicts label i + 1;
    labels of -100, and the first of every row, are not targets. Divide by `count_targets` of the whole
    global batch.
    """
    assert logits.shape[:2] == labels.shape, f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
    return token_loss(logits.reshape(-1, logits.shape[-1]), next_tokens(labels).reshape(-1))


class Targets:
    """The positions of a batch that the loss looks at: how many, and where, is known to the host. An object
    that wrappers of models leave as it is.

    labels [B, L] int64 on the CPU, not shifted; device: where the loss is computed; everywhere bool [B, L]
    on the CPU: positions that a part of the signal counts beside the targets; batch: the micro-batch as it
    came, for a teacher and for pairs; measured: what is wanted is `measure_of` the lesson."""

    def __init__(
        self,
        labels: Tensor,
        device: torch.device,
        everywhere: Tensor | None = None,
        batch: dict[str, Tensor] | None = None,
        measured: bool = False,
    ) -> None:
        assert labels.device.type == "cpu", "read before the batch moves, or the host waits for the device"
        self.batch, self.device, self.measured = batch, device, measured
        targets = next_tokens(labels).reshape(-1)
        looked_at = targets != IGNORE
        counted = looked_at if everywhere is None else everywhere.reshape(-1)
        where = (looked_at | counted).nonzero()[:, 0]
        if not len(where):
            where = where.new_zeros(1)  # one that counts nothing: every tensor still gets its (zero) gradient
        self.where: list[int] = where.tolist()
        self.positions, self.tokens, self.counted, self.labels, self.everywhere = (
            upload(t, device) for t in (where, targets[where], counted[where], labels, counted)
        )

    def stretches(self, rows: int) -> tuple[list[int], list[tuple[Tensor, ...]]]:
        """The B L positions cut so that each stretch has `rows` of those that are looked at, the last one
        what is left: the lengths of the stretches, and of each the places within it, their tokens, whether
        they are counted, and their places in the batch."""
        starts = [0, *self.where[rows::rows], self.labels.numel()]
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        columns = (t.split(rows) for t in (self.positions, self.tokens, self.counted))
        return lengths, [(p - start, t, c, p) for start, p, t, c in zip(starts, *columns, strict=False)]

    def ask(self, inputs: dict[str, Any]) -> Ask:
        assert self.batch is not None, "a teacher is asked about a batch"
        return Ask(self.batch, inputs, self.device, self.measured)

    def looked(self, where: Sequence[int]) -> Looked:
        """For `Signal.joined`: so many positions went through its sums."""
        return Looked(where, self.batch or {})


def target_count(labels: Tensor) -> Tensor:
    """How many labels [B, L] the loss counts, int64, a scalar on their device."""
    return (labels[:, 1:] != IGNORE).sum()


def count_targets(labels: Tensor) -> int:
    """`target_count` as a number: on a GPU the host waits for it."""
    return int(target_count(labels))


def everywhere(batch: dict[str, Tensor]) -> Tensor:
    """bool [B, L]: the positions of a micro-batch (on the CPU) that have a next token in their segment."""
    return within_segments(batch["position_ids"], batch.get("used"))


def part_counts(lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
    """How many positions of a micro-batch each part of the loss counts, int64 [parts], on the CPU."""
    counts = {
        "targets": lambda: target_count(batch["labels"]),
        "all": lambda: everywhere(batch).sum(),
        "pairs": lambda: pair_count(batch["position_ids"]),
        "chosen": lambda: in_chosen(batch["position_ids"], batch.get("used")).sum(),
    }
    return torch.stack([counts[part.on]() for part in lesson.parts.values()])


def loss_forward(
    model: nn.Module, kind: str = "chunked", lesson: Lesson = LABELS, student: Answering | None = None
) -> Callable[..., Any]:
    """A forward for `model` (to be bound to it) that gives the loss: f(model, labels=Targets, **inputs) ->
    the sums of the lesson's parts [parts]. Without labels it is the model's own forward; where they are
    measured it is the sums of `measure_of` the lesson. kind: train.loss; ValueError for one that this
    model cannot have. student: `chunked_head(model)`, where it is there already.

    Being the model's forward, it runs inside whatever wraps the model: autocast, DDP, FSDP; and so does the
    forward of the teacher, which comes first.
    """
    student = student or chunked_head(model)
    plain, head, reason = student.plain, cast(ChunkedHead | None, student.head), student.reason
    fuse = LOSSES[kind].fuse
    if fuse is not None:
        if head is None:
            raise ValueError(
                f"train.loss: got {kind!r}, but the head cannot be taken off: {reason}; "
                "set train.loss: chunked"
            )
        owner: Any = model
        probe = torch.zeros((1, 1), dtype=torch.int64, device=owner.device)
        output = type(head.base(input_ids=probe, use_cache=False))
        head.fused = fuse(model, lambda hidden: head.logits(hidden, output))

    def forward(_: nn.Module, *args: Any, labels: Targets | None = None, **inputs: Any) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        now = measure_of(lesson) if labels.measured else lesson
        answers, beside = asked(now, labels, inputs)
        if head is not None and (labels.labels.numel() > head.at_a_time(answers) or head.fused is not None):
            with beside:
                output = head.base(*args, **inputs, use_cache=False)
            sums = head.loss(output, labels, now, answers)
            return sums if now.lockstep is None else now.lockstep.joined(sums)
        with beside:
            logits = plain(*args, **inputs, use_cache=False).logits
        if logits.numel() > heads.LOGITS_AT_A_TIME:
            size = logits.numel() * logits.element_size() / 1e9
            warnings.warn(
                f"the loss holds all logits at once ({size:.1f} GB, and their gradient): {reason}",
                stacklevel=2,
            )
        logits = logits.reshape(-1, logits.shape[-1])
        tokens, every = next_tokens(labels.labels).reshape(-1), labels.everywhere
        given = None if answers is None else answers(torch.arange(len(logits), device=logits.device))
        sums = now.signal.sums(now.options, logits, tokens, every, given)
        sums = now.signal.joined(now.options, [sums], labels.looked(range(len(logits))))
        return sums if now.lockstep is None else now.lockstep.joined(sums)

    return forward


def asked(
    lesson: Lesson, labels: Targets, inputs: dict[str, Any]
) -> tuple[Answers | None, AbstractContextManager[None]]:
    """The answers of the teacher, which is run now, or in the context of the student's forward where the
    lesson walks through the layers of both."""
    if lesson.teacher is None:
        return None, nullcontext()
    ask = labels.ask(inputs)
    if lesson.lockstep is None:
        return lesson.teacher.answers(ask), nullcontext()
    counted = labels.everywhere.view(inputs["input_ids"].shape)
    return lesson.lockstep.late(ask), lesson.lockstep.together(ask, counted)


def target_logits(model: nn.Module) -> Callable[[dict[str, Any], Targets], Iterator[tuple[Tensor, Tensor]]]:
    """f(inputs, targets) -> the logits [r, V] that predict them and their tokens [r], so many targets at a
    time as a chunk of the loss has; r is the same for every model of a vocabulary. For measuring: nothing
    here is differentiable.
    """
    plain, (head, _) = model.forward, find_head(model)

    @torch.no_grad()
    def chunks(inputs: dict[str, Any], targets: Targets) -> Iterator[tuple[Tensor, Tensor]]:
        if head is None:
            logits = plain(**inputs, use_cache=False).logits
            logits = logits.view(-1, logits.shape[-1])
            rows = max(1, heads.LOGITS_AT_A_TIME // logits.shape[-1])
            for positions, tokens in zip(
                targets.positions.split(rows), targets.tokens.split(rows), strict=True
            ):
                yield logits[positions], tokens
            return
        output = head.base(**inputs, use_cache=False)
        lengths, pairs = targets.stretches(head.rows)
        hidden = output.last_hidden_state.reshape(targets.labels.numel(), -1)
        for part, (places, tokens, *_) in zip(hidden.split(lengths), pairs, strict=True):
            yield head.logits(part[places], type(output)), tokens

    return chunks


class ChunkedHead(Head):
    """The head of a model, and the loss of its logits in chunks."""

    fused: Fused | None = None

    def at_a_time(self, answers: Answers | None) -> int:
        """Positions per chunk: a teacher's logits lie beside the student's, so half as many are as much
        memory."""
        return self.rows if answers is None else max(1, self.rows // 2)

    def loss(
        self, output: Any, targets: Targets, lesson: Lesson = LABELS, answers: Answers | None = None
    ) -> Tensor:
        """Sums of the lesson's parts [parts], from the decoder's output (last_hidden_state [B, L, H])."""
        hidden, kind = output.last_hidden_state, type(output)
        if self.fused is not None and not targets.measured:
            assert lesson.teacher is None and not lesson.signal.pairs, "refused by the recipe"
            rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions)
            return self.fused(rows, targets.tokens)[None]

        def chunk_loss(
            part: Tensor, places: Tensor, tokens: Tensor, counted: Tensor, positions: Tensor
        ) -> Any:
            chosen = part if len(places) == len(part) else part.index_select(0, places)
            given = None if answers is None else answers(positions)
            return lesson.signal.sums(lesson.options, self.logits(chosen, kind), tokens, counted, given)

        # split, not slices: its backward joins the gradients once; every slice would make a whole one.
        lengths, stretches = targets.stretches(self.at_a_time(answers))
        parts = hidden.reshape(-1, hidden.shape[-1]).split(lengths)
        sums: list[Any] = [
            checkpoint(chunk_loss, part, *stretch, use_reentrant=False)
            for part, stretch in zip(parts, stretches, strict=True)
        ]
        return lesson.signal.joined(lesson.options, sums, targets.looked(targets.where))


def chunked_head(model: nn.Module) -> Answering:
    """A model and its head, if that can be taken off. Before anything is changed on the model's forward."""
    return Answering(model.forward, *find_head(model, ChunkedHead))
