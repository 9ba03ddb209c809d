"""Labelled: what the tasks share whose batches hold their answers: the goal of training, the table, the head.

    loss = sum over the answers of a batch / number of answers of the whole global batch

A member says what its model is built for, what a row becomes, what the loss is, and what is measured; the
head of its model trains whole, in fp32, beside the adapters of the packed layers (`train_head`).
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.errors import DataError
from ..data.mix import named
from ..evaluate.perplexity import EvalRow
from ..model.heads import Answering
from ..model.linear import packed_op_only
from ..model.tokenizer import pad_id
from ..model.upload import upload_each
from ..model.walk import Batch
from ..signals import Ask, Lesson, Whole
from ..signals.divergence import Divergence, divergence
from ..train.goal import Goal, Pace
from . import scores
from .base import Dense, Feed, Measure, Task, inputs_of
from .batches import RowBatches, Shown, taken_by
from .rows import Encoder, Rows, read_encoded

MEASURED_TOKENS = 4096  # of a batch that is measured


class Labelled(Task):
    """The contract of its members."""

    windows: ClassVar[bool] = False
    answers: ClassVar[tuple[str, ...]] = ("labels",)  # of a batch, what the model is not called with
    scored: ClassVar[bool] = True  # by what `missing` tells of
    inputs: ClassVar[frozenset[str]] = frozenset({"input_ids", "attention_mask"})  # what calibrators look at
    unit: ClassVar[str] = "rows"
    taught: ClassVar[bool] = True  # what its model says can be compared with what a teacher says (`between`)
    likely: ClassVar[bool] = True  # and that is a distribution: temperature and divergence mean something
    layered: ClassVar[bool] = True  # it has layers of tokens, which signals of layers can compare

    train_head: bool = Field(
        default=True, description="the head of the model trains, dense and whole, beside the adapters"
    )

    @property
    def trains_head(self) -> bool:
        return self.train_head

    @property
    def goal(self) -> Goal:
        return Answered(self)

    def missing(self) -> str | None:
        """Why nothing can be scored here, with the way out; None when it can."""
        return scores.missing()

    def outputs(self, model: Callable[..., Any], inputs: Mapping[str, Any], labels: Mapping[str, Any]) -> Any:
        """What a model says of the inputs of a batch. A model whose loss is its own is given the answers
        too."""
        return self.reply(model, inputs)

    def reply(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """What a model says of the inputs of a batch, whose answers it never sees: a teacher."""
        return model(**inputs, use_cache=False)

    @abstractmethod
    def loss(self, outputs: Any, labels: dict[str, Any]) -> Tensor:
        """The sum of the losses over the answers of a batch, fp32, a scalar. outputs: of the model."""

    def answering(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """The rows of logits [n, C] that the answers are made of."""
        return logits

    def apart(
        self,
        ours: Tensor,
        theirs: Tensor,
        labels: dict[str, Tensor],
        temperature: float = 1.0,
        kind: Divergence = "forward",
    ) -> Tensor:
        """How far the logits of a model are from its teacher's, summed over the answers of a batch: a scalar,
        differentiable in `ours`."""
        ours, theirs = self.answering(ours, labels), self.answering(theirs, labels)
        every = torch.ones(len(ours), dtype=torch.bool, device=ours.device)
        return divergence(ours, Whole(theirs), every, temperature, kind)

    def between(
        self,
        ours: Any,
        theirs: Any,
        labels: dict[str, Any],
        temperature: float = 1.0,
        kind: Divergence = "forward",
    ) -> Tensor:
        """The same of all that the two said, as `reply` gives it; of most it is the logits."""
        return self.apart(ours.logits, theirs.logits, labels, temperature, kind)

    def beside(self, first: Callable[[], Any], *others: Callable[[], Any]) -> list[Any]:
        """What several models say of one batch, in this order, so that it can be compared: where a model
        chooses what it answers about, all answer about what the first one chose."""
        return [first(), *(other() for other in others)]

    @abstractmethod
    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many answers a batch has, int64, a scalar."""

    @abstractmethod
    def said(
        self, outputs: Any, labels: dict[str, Tensor], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """(right answers, the model's) of a batch, made of these rows, as `score` takes them."""

    @abstractmethod
    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        """The measures of all answers, by name."""

    def blank(self, windows: int, length: int) -> dict[str, Tensor]:
        """Answers without data, of so many rows of so many tokens."""
        raise AssertionError(f"{type(self).__name__} has no answers")

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        ids, mask = (torch.empty((windows, length), dtype=torch.int64) for _ in range(2))
        outputs = model(input_ids=ids, attention_mask=mask)
        return self.loss(outputs, self.blank(windows, length)) if loss else outputs

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        """How rows are read."""
        raise AssertionError(f"{type(self).__name__} reads no rows")

    def examples(
        self, source: Any, section: Any, tokenizer: Any, *, seed: int = 0, rows: int | None = None
    ) -> Any:
        return read_encoded(source, section, self.encoder(source, section, tokenizer), rows)

    def shown(self, tokenizer: Any, model: Any) -> Shown:
        """What a batch shows of a row. model: what it is for; None: calibrators, which see all of it."""
        return lambda row, key: row

    def batches(
        self, feed: Feed, model: Any, examples: Any, size: int, *, shuffle: bool, taught: bool = False
    ) -> Batches:
        """taught: a teacher knows by the mask what is padding."""
        return RowBatches(
            examples,
            size,
            pad_id(feed.tokenizer),
            feed.r.train.seed,
            rank=feed.rank,
            world=feed.world,
            shuffle=shuffle,
            taken=taken_by(model, self.answers),
            shown=self.shown(feed.tokenizer, model),
        )

    def calibration(
        self,
        source: Any,
        section: Any,
        tokenizer: Any,
        *,
        rows: int | None,
        seed: int,
        samples: int,
        sequence_len: int,
        size: int,
    ) -> list[Batch]:
        """A seeded choice of the rows (or windows), padded: what their masks hide, nobody looks at."""
        section = section.model_copy(update={"sequence_len": sequence_len})
        pool = self.examples(source, section, tokenizer, rows=rows)
        picked = random.Random(seed).sample(range(len(pool)), min(samples, len(pool)))
        if not picked:
            raise DataError("no usable row to calibrate on", named(source))
        chosen = type(pool)(pool[i] for i in sorted(picked))
        found = self.looked_at(chosen, min(size, len(chosen)), tokenizer, seed)
        return [inputs_of(batch, self.answers) for batch in found.one_epoch()]

    def looked_at(self, chosen: Any, size: int, tokenizer: Any, seed: int) -> Batches:
        """The batches of rows that calibrators look at. seed: of what is drawn for a row."""
        return RowBatches(
            chosen,
            size,
            pad_id(tokenizer),
            shuffle=False,
            taken=self.inputs,
            shown=self.shown(tokenizer, None),
        )

    def measure(self, feed: Feed, source: Any, model: Any, dense: Dense, rows: int | None) -> Measure:
        """The first eval.windows rows (null: all), the longest first."""
        r = feed.r
        found = self.examples(source, r.data, feed.tokenizer, rows=rows)
        return Answers(self, feed, self.first(found, r.eval.windows), model, dense)

    def first(self, examples: Any, count: int | None) -> Any:
        """The first `count` of them, in the order they are measured in."""
        return Rows(examples[:count] if count is not None else examples[:], examples.report).by_length()


class Answers(Measure):
    """Loss and scores of a task."""

    def __init__(
        self, task: Labelled, feed: Feed, chosen: Any, model: Any, dense: Dense, size: int | None = None
    ) -> None:
        """size: rows of a batch; None: as many as have so many tokens."""
        self.task, self.dense, self.count, self.unit = task, dense, len(chosen), task.unit
        self.size = size or max(1, MEASURED_TOKENS // feed.r.data.sequence_len)
        self.batches = task.batches(feed.alone, model, chosen, self.size, shuffle=False)
        self.rows = chosen

    def reference(self) -> Iterator[EvalRow]:
        yield self.row(self.dense.load(), "base")

    def loss(self, outputs: Any, labels: dict[str, Any]) -> Tensor | None:
        """The sum of the losses of a batch; None where the reader of the model computes none."""
        return self.task.loss(outputs, labels)

    def said(self, outputs: Any, labels: dict[str, Any], rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(right answers, the model's) of a batch."""
        return self.task.said(outputs, labels, rows)

    @torch.no_grad()
    def row(self, model: Any, stage: str) -> EvalRow:
        device, training = next(model.parameters()).device, model.training
        model.eval()
        count = 0
        total: float | None = 0.0
        true: list[Any] = []
        said: list[Any] = []
        with packed_op_only(model):
            for number, batch in enumerate(self.batches.one_epoch()):
                rows = self.rows[number * self.size : (number + 1) * self.size]
                moved = {name: upload_each(value, device) for name, value in batch.items()}
                labels = {name: moved[name] for name in self.task.answers}
                outputs = self.task.outputs(model, inputs_of(moved, self.task.answers), labels)
                loss = self.loss(outputs, labels)
                total = None if loss is None or total is None else total + float(loss)
                count += int(self.task.count(batch))
                right, own = self.said(outputs, labels, rows)
                true += right
                said += own
        model.train(training)
        if not count:
            raise ValueError("the evaluation data has no answers: nothing to measure (check eval.data)")
        mean = None if total is None else total / count
        # of tokens
        perplexity = None if mean is None or not self.task.windows else math.exp(min(mean, 700.0))
        return EvalRow(stage, mean, perplexity, None, count, self.scores(stage, true, said))

    def scores(self, stage: str, true: list[Any], said: list[Any]) -> dict[str, float]:
        return self.task.score(true, said)


class Labels:
    """The answers of a batch on the device; an object that wrappers of models leave as it is. measured: the
    loss of the labels is wanted, whatever is learned from."""

    def __init__(self, values: dict[str, Any], measured: bool = False) -> None:
        self.values, self.measured = values, measured


class Answered(Goal):
    """The goal of a task whose batches hold their answers. The loss is that of the answers, or of a signal
    that compares the model's with those of a teacher, by themselves or layer by layer."""

    def __init__(self, task: Labelled) -> None:
        self.task = task

    @property
    def pace(self) -> Pace:
        return self.task.pace

    def counts(self, lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
        def count(on: str) -> Tensor:
            return self.task.count(batch) if on == "targets" else real(batch, batch["input_ids"]).sum()

        return torch.stack([count(part.on) for part in lesson.parts.values()])

    def asked(
        self, model: nn.Module, lesson: Lesson, batch: dict[str, Tensor], device: torch.device, measured: bool
    ) -> dict[str, Any]:
        inputs = {k: upload_each(v, device) for k, v in inputs_of(batch, self.task.answers).items()}
        values = {k: upload_each(batch[k], device) for k in self.task.answers}
        return {**inputs, "labels": Labels(values, measured)}

    def begun(self, lesson: Lesson, model: nn.Module, student: Answering) -> AbstractContextManager[None]:
        """Inside, the lesson is ready."""
        return lesson.signal.begin(lesson, model, student)

    def beside(self, lesson: Lesson) -> dict[str, Any]:
        """What both models are called with beside the inputs."""
        return {}

    def forward(self, model: nn.Module, section: Any, lesson: Lesson, changes: ExitStack) -> Any:
        plain = model.forward
        changes.enter_context(self.begun(lesson, model, Answering(plain, None, whole=True)))

        def forward(_: nn.Module, *args: Any, labels: Labels | None = None, **inputs: Any) -> Any:
            if labels is None:
                return plain(*args, **inputs)
            if labels.measured or lesson.teacher is None:
                outputs = self.task.outputs(partial(plain, *args), inputs, labels.values)
                return self.task.loss(outputs, labels.values)[None]
            return self._compared(lesson, plain, inputs, labels.values)

        return forward

    def _compared(
        self, lesson: Lesson, plain: Any, inputs: dict[str, Any], labels: dict[str, Tensor]
    ) -> Tensor:
        """The sums of the parts [parts] of a signal that asks a teacher. plain: the forward of the model."""
        task, inputs = self.task, {**inputs, **self.beside(lesson)}
        ask = Ask({}, inputs, next(iter(inputs.values())).device)

        def student() -> Any:
            seen = "labels" in lesson.parts
            return task.outputs(plain, inputs, labels) if seen else task.reply(plain, inputs)

        if (lockstep := lesson.lockstep) is not None:
            with lockstep.together(ask, real(inputs, inputs["input_ids"])):
                ours = student()
            theirs = lockstep.outputs(ask)
        else:
            assert lesson.teacher is not None
            walked = lesson.teacher.walked()
            assert walked is not None, "refused by the recipe"

            def teacher() -> Any:
                with torch.no_grad(), walked.at_work(walked.model):
                    return task.reply(walked.answering.plain, walked.inputs(ask))

            theirs, ours = task.beside(teacher, student)  # before the student, which it may be
        sums = self.sums(lesson, ours, theirs, labels)
        own = torch.stack([sums[name]() for name in lesson.parts if name in sums])
        return own if lockstep is None else lockstep.joined(own)

    def sums(
        self, lesson: Lesson, ours: Any, theirs: Any, labels: dict[str, Any]
    ) -> dict[str, Callable[[], Tensor]]:
        """By part, its sum over a batch, of what the model and its teacher said."""
        how = lesson.options
        return {
            "labels": lambda: self.task.loss(ours, labels),
            "logits": lambda: self.task.between(ours, theirs, labels, how.temperature, how.divergence),
        }


def yes_or_no(logits: Tensor) -> Tensor:
    """Logits of sigmoids, of any shape [n] -> [n, 2]: sigmoid(z) is the softmax of z and 0."""
    flat = logits.flatten()
    return torch.stack([flat, torch.zeros_like(flat)], -1)


def real(batch: dict[str, Tensor], ids: Tensor) -> Tensor:
    """bool [B, L]: the tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
