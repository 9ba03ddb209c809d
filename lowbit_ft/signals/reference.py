"""train.signal.reference: the policy that a preference loss measures from, which is the packed base itself.

The student without its adapters, in eval mode: no second model. `step` runs it before the student's forward
in every micro-batch; `cached` has run it about every window once, before training (sequences.py).

A reference says the log-probability of a token at a position, and a loss adds up those of an answer. What is
kept is the sum of an answer alone: it stands at the answer's first token, with 0 at the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.attach import adapters_off
from ..files.errors import FileError
from ..model import heads
from ..model.heads import Answering, resting
from ..model.linear import packed_op_only
from ..model.upload import upload
from .base import Answers, Ask, Costs, Known, Making, Teacher
from .sequences import BYTES_PER_PAIR, SequenceStore
from .tokens import IGNORE, next_tokens, sequence_numbers, token_log_probs


class StepReference(Teacher):
    """reference: step."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__({"reference": "step"})
        self.student = student
        self.answering: Answering | None = None

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, beside: int, vocabulary: int) -> Costs:
        return Costs(forwards=1.0, note="the base without adapters, no second copy")

    @classmethod
    def make(cls, making: Making, name: str) -> StepReference:
        return cls(making.model)

    @contextmanager
    def begin(self, student: Answering) -> Iterator[None]:
        self.answering = student
        try:
            yield
        finally:
            self.answering = None

    def answers(self, ask: Ask) -> Answers:
        said = self.say(ask)
        return lambda positions: Known(said[positions])

    @torch.no_grad()
    def say(self, ask: Ask) -> Tensor:
        """log p of the next token at every position of a micro-batch, flat [B L]; 0 where there is no
        target."""
        answering = self.answering
        assert answering is not None, "begin() first"
        tokens = next_tokens(ask.batch["labels"]).reshape(-1)
        where = (tokens != IGNORE).nonzero()[:, 0]
        places, there = upload(where, ask.device), upload(tokens[where], ask.device)
        with self._at_work():
            read = answering.read(ask.inputs)
            vocabulary = self.student.config.get_text_config().vocab_size  # pyright: ignore
            rows = max(1, heads.LOGITS_AT_A_TIME // vocabulary)
            parts = [
                token_log_probs(read(some), goals)
                for some, goals in zip(places.split(rows), there.split(rows), strict=True)
            ]
        said = torch.cat(parts) if len(where) else torch.zeros(0, device=ask.device)
        return said.new_zeros(len(tokens)).index_copy_(0, places, said)

    def _at_work(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for context in (adapters_off, packed_op_only, resting):
            stack.enter_context(context(self.student))
        return stack


class CachedReference(Teacher):
    """reference: cached. valid: what is kept of the validation windows, where there are some."""

    batches_need: ClassVar[frozenset[str]] = frozenset({"windows"})

    def __init__(self, store: SequenceStore, valid: SequenceStore | None) -> None:
        super().__init__({"reference": "cached", "answers": store.digest})
        self.store, self.valid = store, valid

    @classmethod
    def problems(cls, recipe: Any, name: str) -> list[str]:
        found = []
        if recipe.data.streaming:
            found.append(
                "the windows of a streamed data set are not known before it is read; set data.streaming: "
                "false, or reference: step"
            )
        if recipe.train.sharding == "fsdp":
            found.append(
                "it is asked before the base is spread over the processes, where none may hold it; set "
                "reference: step, or sharding: none"
            )
        return found

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, beside: int, vocabulary: int) -> Costs:
        note = f"the base without adapters, asked once; {BYTES_PER_PAIR} bytes on the disk per pair"
        return Costs(before=1.0, note=note)

    @classmethod
    def make(cls, making: Making, name: str) -> CachedReference:
        return cls(*making.referred())

    def answers(self, ask: Ask) -> Answers:
        store = self.valid if ask.measured else self.store
        numbers = ask.batch["windows"].tolist() if "windows" in ask.batch else []
        assert store is not None, "validation windows were there when the reference was asked"
        sums, first = store.lookup(numbers), first_tokens(ask.batch)
        if len(first) != len(sums):
            raise FileError(
                f"{store.folder}: has {len(sums)} answers of windows {numbers}, where the data has "
                f"{len(first)}; it is of other windows: remove it and run the line again"
            )
        said = torch.zeros(ask.batch["labels"].numel(), dtype=torch.float64)
        said = upload(said.index_copy_(0, first, sums), ask.device)
        return lambda positions: Known(said[positions])


def first_tokens(batch: dict[str, Tensor]) -> Tensor:
    """int64 [answers]: the place in the B L of a micro-batch where the first token of each answer is
    predicted."""
    where = (next_tokens(batch["labels"]) != IGNORE).reshape(-1).nonzero()[:, 0]
    number = sequence_numbers(batch["position_ids"]).reshape(-1)[where]
    return where[torch.cat([number[:1] >= 0, number[1:] != number[:-1]])]


REFERENCES: dict[str, type[Teacher]] = {"step": StepReference, "cached": CachedReference}
