"""The contract of a task: the section `task` of a recipe, and what the stages ask of it.

`r` is a whole recipe, `section` its data section, everywhere below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..data.batches import Batches
from ..data.synthesis.labeller import Labeller
from ..evaluate.perplexity import EvalRow
from ..model.purpose import Purpose
from ..model.walk import Batch
from ..train.goal import TOKENS, Goal, Pace

CLOSED = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Feed:
    """What batches are made with: the recipe, the tokenizer, which process of how many this is, and what to
    tell the user by."""

    r: Any
    tokenizer: Any
    rank: int = 0
    world: int = 1
    say: Callable[[object], object] = print

    @property
    def alone(self) -> Feed:
        """The same for the only process."""
        return Feed(self.r, self.tokenizer, say=self.say)


class Measure:
    """What the rows of the table are measured on, and how. `count` of `unit` is told to the user."""

    count: int
    unit: str

    def reference(self) -> Iterator[EvalRow]:
        """The rows of the full-precision model, measured by itself: one, or none."""
        raise AssertionError(f"{type(self).__name__} has no reference")

    def row(self, model: Any, stage: str) -> EvalRow:
        """The row of a model in memory; it is left in its mode."""
        raise AssertionError(f"{type(self).__name__} measures nothing")

    def files(self) -> Mapping[str, Any]:
        """What the report shows of the rows so far, beside their numbers: path in the run's folder -> bytes,
        or what its JSON says."""
        return {}


@dataclass(frozen=True)
class Dense:
    """Where the full-precision model is: its checkpoint, and how it is run. load(): the whole of it, on a
    device that holds it."""

    checkpoint: Any
    attention: str
    device: torch.device
    dtype: torch.dtype
    load: Callable[[], Any]


class Task(BaseModel):
    """A member of TASKS. Subclasses add their own keys; unknown keys are refused."""

    model_config = CLOSED

    language: ClassVar[bool] = False  # it writes text: signals, chats, rotations, prompts, lm-eval are for it
    windows: ClassVar[bool] = True  # its rows are windows of text, by data's formats
    unit: ClassVar[str] = "windows"  # what it learns from, in the plural
    reads: ClassVar[str] = "text"  # or images: then what is called tokenizer is an image processor
    pipeline: ClassVar[str]  # what the hub calls it
    auto: ClassVar[str]  # the class by which users load what ships
    peft: ClassVar[str | None]  # PEFT's word for it (TaskType)
    measured: ClassVar[int | None] = None  # rows that are measured at a time; None: by their tokens
    dtype: ClassVar[str | None] = None  # of its model, where it has to be this one
    walked: ClassVar[bool] = True  # its model is a chain of layers that a calibrator can walk (see walks)
    states: ClassVar[bool] = False  # its hidden states have any shape, and are compared whole (states.py)
    smooths: ClassVar[bool] = False  # it is known where its model takes the factors of quant.smooth in
    segmented: ClassVar[bool] = False  # its adapters may be in the parts of fused matrices
    command: ClassVar[str | None] = None  # what a shell does with a {folder} that ships; None: serves it

    kind: str

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def unfit(self, config: Mapping[str, Any]) -> str | None:
        """Why a checkpoint of this config.json is none for it, or what is missing to build it; None: nothing
        is known against it."""
        return None

    @property
    def shipped(self) -> tuple[str, str | None]:
        """(pipeline, command) of what ships of this very task."""
        return self.pipeline, self.command

    def walks(self, config: Mapping[str, Any]) -> bool:
        """`walked`, of a checkpoint of this config.json ({}: not known yet)."""
        return self.walked

    def settled(self, r: Any, config: Any) -> Task:
        """With what only the rows and the checkpoint say (labels). config: its config.json."""
        return self

    def purpose(self, seed: int) -> Purpose | None:
        """What the model is built for; None: to write text."""
        return None

    @property
    def trains_head(self) -> bool:
        """Whether the head of the model trains, dense, beside the adapters."""
        return False

    @property
    def goal(self) -> Goal:
        """How a batch becomes the loss of training."""
        raise AssertionError(f"{type(self).__name__} has no goal")

    @property
    def pace(self) -> Pace:
        """What it counts to say how fast a run is."""
        return TOKENS

    def examples(
        self, source: Any, section: Any, tokenizer: Any, *, seed: int = 0, rows: int | None = None
    ) -> Any:
        """What the rows of a source (or of several) become: a sequence with `report` and `digest`. rows: of
        the model's embedding. DataError where there is no usable one."""
        raise AssertionError(f"{type(self).__name__} has no examples")

    def batches(
        self, feed: Feed, model: Any, examples: Any, size: int, *, shuffle: bool, taught: bool = False
    ) -> Batches:
        """Endless micro-batches of `size` examples. taught: with what a teacher has to know."""
        raise AssertionError(f"{type(self).__name__} has no batches")

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
        """What a calibrator looks at: what the model is called with, for `samples` examples."""
        raise AssertionError(f"{type(self).__name__} has no calibration")

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        """For planning, where tensors have no data: the forward of a batch of so many rows; loss: up to the
        loss. Not asked of language models."""
        raise AssertionError(f"{type(self).__name__} is not rehearsed")

    def labeller(self, processor: Any) -> Labeller | None:
        """How it answers, for rows that the model makes itself of images; None: such cannot be made."""
        return None

    def measure(self, feed: Feed, source: Any, model: Any, dense: Dense, rows: int | None) -> Measure:
        """The table's data, of the eval section. source: rows; model: the packed one."""
        raise AssertionError(f"{type(self).__name__} measures nothing")


def inputs_of(batch: dict[str, Tensor], answers: Sequence[str]) -> dict[str, Tensor]:
    """Of a batch, what the model is called with."""
    return {name: value for name, value in batch.items() if name not in answers}
