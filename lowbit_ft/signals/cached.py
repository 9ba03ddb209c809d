"""train.teacher: cached. The full-precision model's k likeliest tokens at every position the loss looks at, asked
once before training and read from the disk while it lasts.

A step costs no forward of a teacher and no memory of one: some KB per token are read and sent along with the
batch. What is compared is k tokens and one outcome for all others (divergence.py), at the temperature at which the
teacher was asked, so that at any temperature its words are exact but for float16 (store.py). What is lost is
what the teacher says among the others; TOP_K is where more bought little:

    (table)

One asking serves every run on the same windows: train.teacher_dir is a folder that several may read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Answers, Ask, Costs, Making, Sparse, Teacher
from .store import Store, bytes_per_position
from .tokens import IGNORE, next_tokens, within_segments

TOP_K = 64


class Cached(Teacher):
    batches_need: ClassVar[frozenset[str]] = frozenset({"windows"})

    def __init__(self, store: Store) -> None:
        super().__init__({"teacher": "cached", "answers": store.digest})
        self.store = store

    @classmethod
    def problems(cls, recipe: Any, name: str) -> list[str]:
        found = []
        quant, data = getattr(recipe, "quant", None), getattr(recipe, "data", None)
        if quant is not None and quant.from_checkpoint:
            found.append(
                "the checkpoint comes quantized, so there is no full-precision model to ask; set train.teacher to "
                "the folder or hub id of the dense model, or signal.kind: labels"
            )
        if data is not None and data.streaming:
            found.append(
                "the windows of a streamed data set are not known before it is read; set data.streaming: false, "
                "or train.teacher: residual"
            )
        return found

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, packed: int) -> Costs:
        return Costs()

    @classmethod
    def make(cls, making: Making, name: str) -> Cached:
        return cls(making.kept())

    def answers(self, ask: Ask) -> Answers:
        batch, on = ask.batch, self.store.key["on"]
        if on == "all":
            looked = within_segments(batch["position_ids"], batch.get("used"))
        else:
            looked = next_tokens(batch["labels"]) != IGNORE
        found = self.store.lookup(batch["windows"].tolist())
        where = looked.reshape(-1).nonzero()[:, 0]
        if len(where) != len(found.ids):
            raise ValueError("x")
        rows = torch.full((looked.numel(),), -1)
        rows[where] = torch.arange(len(where))
        ...
