"""train.teacher: cached. The full-precision model's k likeliest tokens at every position the loss looks at,
asked once before training and read from the disk while it lasts.

A step costs no forward of a teacher and no memory of one: some hundred bytes per token are read and sent
along with the batch. What is compared is k tokens and one outcome for all others (divergence.py), at the
temperature at which the teacher was asked, so the words that are kept are exact at any temperature but for
float16 (store.py). What is lost is what the teacher says among the others. Measured (LOG.md; tiny Llama,
vocabulary 4096, the length of the error of the gradient over that of the whole divergence's gradient, in
percent):

    k                     16    32    64   128   256        bytes per position    4 k + 2, of a vocabulary
    W4                   9.3   6.0   3.8   2.4   1.3                              beyond 65,536 6 k + 2
    W2                  13.4   9.6   6.7   3.8   2.3
    W2, temperature 2   30.9  27.3  23.7  20.0  16.1

so 64 is taken, and a warm teacher is better asked live: what it says is spread over more tokens than are
kept. One asking serves every run on the same windows: train.teacher_dir is a folder that several may read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..files.errors import FileError
from ..model.upload import upload
from .base import Answers, Ask, Costs, Making, Sparse, Teacher
from .store import LEAST, Store, bytes_per_position
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
                "the checkpoint comes quantized, so there is no full-precision model to ask; set "
                "train.teacher to the folder or hub id of the dense model, or signal.kind: labels"
            )
        if data is not None and data.streaming:
            found.append(
                "the windows of a streamed data set are not known before it is read; set data.streaming: "
                "false, or train.teacher: residual"
            )
        return found

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, beside: int, vocabulary: int) -> Costs:
        """At most: windows that are seen several times are asked about once, and only where the loss looks.
        How many windows epochs are is not known before the data is read."""
        train = recipe.train
        each = bytes_per_position(min(train.signal.top_k or TOP_K, vocabulary), vocabulary)
        note = f"full precision, asked once; {each:,} bytes on the disk per position it is asked at"
        windows = (train.max_steps or 0) * train.micro_batch_size * train.gradient_accumulation_steps
        return Costs(disk=windows * recipe.data.sequence_len * each, before=1.0, walks=True, note=note)

    @classmethod
    def make(cls, making: Making, name: str) -> Cached:
        return cls(making.kept())

    def answers(self, ask: Ask) -> Answers:
        looked = looked_at(ask.batch, self.store.key["on"])
        found = self.store.lookup(ask.batch["windows"].tolist())
        where = looked.reshape(-1).nonzero()[:, 0]
        if len(where) != len(found.ids):
            raise FileError(
                f"{self.store.folder}: has {len(found.ids)} positions of windows "
                f"{ask.batch['windows'].tolist()}, where the loss looks at {len(where)}; it is of other "
                "windows: remove it and run the line again"
            )
        if not len(where):  # nothing is looked at; the loss asks about one position and does not count it
            found = _nothing(found)
        row = torch.zeros(looked.numel(), dtype=torch.int64)
        row[where] = torch.arange(len(where))
        row, ids, log_p, rest = (upload(t, ask.device) for t in (row, found.ids, found.log_p, found.rest))

        def answer(positions: Tensor) -> Sparse:
            rows = row[positions]
            return Sparse(ids[rows], log_p[rows], rest[rows])

        return answer


def looked_at(batch: dict[str, Tensor], on: str) -> Tensor:
    """bool [B, L]: the positions of a micro-batch that the signal looks at, and so those that are kept."""
    looked = next_tokens(batch["labels"]) != IGNORE
    return looked | within_segments(batch["position_ids"], batch.get("used")) if on == "all" else looked


def _nothing(found: Sparse) -> Sparse:
    """One position of which all k tokens are as likely."""
    k = found.ids.shape[-1]
    return Sparse(torch.arange(k)[None], torch.full((1, k), -math.log(k)), torch.full((1,), float(LEAST)))
