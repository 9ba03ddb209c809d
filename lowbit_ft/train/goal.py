"""What the loop minimises: how a micro-batch becomes the sums of the parts of a loss, and what these are
divided by.

`NextTokens` is a language model's: every position predicts the token behind it, and the signal (signals/)
says how it is judged. Another task has a goal of its own (tasks/), whose batches hold what its model takes
and its labels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import segment_attention, segment_inputs
from ..model.maps import map_attention
from ..model.upload import upload
from ..signals import Lesson
from ..signals.base import TAUGHT
from .losses import Targets, chunked_head, everywhere, loss_forward, measure_of, part_counts

BESIDE = ("labels", *TAUGHT)  # of a batch, what no model is given


@dataclass(frozen=True)
class Pace:
    """What a task counts to say how fast a run is: `key` in metrics.jsonl (and key_per_s), `word` for people.
    count(batch): how many a micro-batch has, an integer; each: what one of them is in the unit of the key.
    planned(rows, length): the count of so many rows of `length` tokens, before there are any; None: nobody
    knows."""

    key: str
    word: str
    count: Callable[[dict[str, Any]], int]
    planned: Callable[[int, int], int | None]
    each: float = 1

    def told(self, counted: int, counted_all: int, seconds: float) -> dict[str, float]:
        """For a line of metrics.jsonl: of all steps so far, and of one that took so many seconds."""
        return {self.key: counted_all * self.each, f"{self.key}_per_s": counted * self.each / seconds}


TOKENS = Pace(
    "tokens", "tokens", lambda batch: batch["input_ids"].numel(), lambda rows, length: rows * length
)
IMAGES = Pace("images", "images", lambda batch: len(next(iter(batch.values()))), lambda rows, length: rows)


class Goal:
    """The contract. A batch is what `TrainBatches` gives, on the CPU."""

    @property
    def pace(self) -> Pace:
        """What is counted of a batch, for the pace that is told."""
        return TOKENS

    def counts(self, lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
        """How many answers of a micro-batch each part of the loss counts, int64 [parts], on the CPU."""
        raise AssertionError(f"{type(self).__name__} has no counts")

    def asked(
        self, model: nn.Module, lesson: Lesson, batch: dict[str, Tensor], device: torch.device, measured: bool
    ) -> dict[str, Any]:
        """What the forward of `forward` is called with; measured: what is wanted is the validation's loss."""
        raise AssertionError(f"{type(self).__name__} asks nothing")

    def attention(self, model: nn.Module, lesson: Lesson) -> AbstractContextManager[None]:
        """How the model attends while it trains."""
        return map_attention(model) if lesson.signal.reads_maps(lesson.options) else nullcontext()

    def forward(self, model: nn.Module, section: Any, lesson: Lesson, changes: ExitStack) -> Any:
        """The forward that is bound to the model while it trains: called with `asked` it gives the sums of
        the parts [parts], without labels it is the model's own. changes: what is undone behind training."""
        raise AssertionError(f"{type(self).__name__} has no forward")


class NextTokens(Goal):
    """A language model's."""

    def counts(self, lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
        return part_counts(lesson, batch)

    def asked(
        self, model: nn.Module, lesson: Lesson, batch: dict[str, Tensor], device: torch.device, measured: bool
    ) -> dict[str, Any]:
        # Lengths of segments and places of targets are read here, on the CPU: the device is not asked for
        # them.
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k not in BESIDE} | segment_inputs(
            model, batch.get("position_ids")
        )
        inputs = {k: upload(v, device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        lesson = measure_of(lesson) if measured else lesson
        every = everywhere(batch) if any(p.on == "all" for p in lesson.parts.values()) else None
        labels = lesson.signal.labels(batch)
        return {**inputs, "labels": Targets(labels, device, every, batch, measured)}

    def attention(self, model: nn.Module, lesson: Lesson) -> AbstractContextManager[None]:
        if lesson.signal.reads_maps(lesson.options):
            return super().attention(model, lesson)
        return segment_attention(model)

    def forward(self, model: nn.Module, section: Any, lesson: Lesson, changes: ExitStack) -> Any:
        student = chunked_head(model)
        changes.enter_context(lesson.signal.begin(lesson, model, student))
        return loss_forward(model, section.loss, lesson, student)


NEXT_TOKENS = NextTokens()
