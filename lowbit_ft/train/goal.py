"""What the loop minimises: how a micro-batch becomes the sums of the parts of a loss, and what these are
divided by.

`NextTokens` is a language model's: every position predicts the token behind it, and the signal (signals/)
says how it is judged. Another task has a goal of its own (tasks/), whose batches hold what its model takes
and its labels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
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


class Goal:
    """The contract. A batch is what `TrainBatches` gives, on the CPU."""

    def counts(self, lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
        """How many answers of a micro-batch each part of the loss counts, int64 [parts], on the CPU."""
        raise AssertionError(f"{type(self).__name__} has no counts")

    def size(self, batch: dict[str, Tensor]) -> int:
        """The tokens of a micro-batch, for the pace that is told; of images, how many they are."""
        return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))

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
