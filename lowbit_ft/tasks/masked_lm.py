"""task: masked_lm. Some tokens of a window are hidden, and the model says which they were.

Of the tokens (never of special ones) a share `mask` is looked at: 8 in 10 of them become the mask token, 1 in
10 a token at random, 1 in 10 stay as they are (BERT, arXiv 1810.04805, section 3.1). Which, is a function of
the seed, the epoch and the window: a resumed run hides the same, and what is measured is hidden once for all
stages.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data.errors import DataError
from ..data.examples import load_examples
from ..data.windows import IGNORE, Example, Examples
from ..model.purpose import Purpose
from .batches import Shown
from .labelled import Labelled
from .rows import Encoded


class MaskedLM(Labelled):
    windows: ClassVar[bool] = True
    unit: ClassVar[str] = "windows"
    pipeline: ClassVar[str] = "fill-mask"
    auto: ClassVar[str] = "AutoModelForMaskedLM"
    peft: ClassVar[str | None] = None

    kind: Literal["masked_lm"] = "masked_lm"
    train_head: bool = Field(
        default=False, description="the head of the model trains, dense and whole, beside the adapters"
    )
    mask: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15, description="the share of the tokens that the loss looks at"
    )

    def purpose(self, seed: int) -> Purpose:
        return Purpose(self.auto, {}, seed)

    def examples(
        self, source: Any, section: Any, tokenizer: Any, *, seed: int = 0, rows: int | None = None
    ) -> Examples:
        if tokenizer.mask_token_id is None:
            raise DataError("task: masked_lm needs a mask token, and this tokenizer has none")
        found = load_examples(source, section, tokenizer, seed=seed, rows=rows)
        found.report.notes = [note for note in found.report.notes if "EOS" not in note]  # nothing is written
        return found

    def shown(self, tokenizer: Any, model: Any) -> Shown:
        """Windows with some tokens hidden; nothing is hidden from calibrators."""
        hide = None if model is None else Hiding(self.mask, tokenizer, model.config.vocab_size)

        def show(window: Example, key: str) -> Encoded:
            ids, labels = window.input_ids, [IGNORE] * len(window.input_ids)
            if hide is not None:
                ids, labels = hide(ids, key)
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

        return show

    def first(self, examples: Any, count: int | None) -> Any:
        return Examples(examples[:count] if count is not None else examples[:])

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        right = labels["labels"]
        chosen = self.answering(outputs.logits, labels).float()
        return F.cross_entropy(chosen, right[right != IGNORE], reduction="sum")

    def answering(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        return logits.flatten(0, 1)[labels["labels"].flatten() != IGNORE]

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        """Which positions are looked at is in data that is not there: as many of the first."""
        ids, mask = (torch.empty((windows, length), dtype=torch.int64) for _ in range(2))
        outputs = model(input_ids=ids, attention_mask=mask)
        if not loss:
            return outputs
        looked = outputs.logits.flatten(0, 1)[: max(1, round(self.mask * windows * length))].float()
        return F.cross_entropy(looked, torch.empty(len(looked), dtype=torch.int64), reduction="sum")

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    def said(
        self, outputs: Any, labels: dict[str, Tensor], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        right = labels["labels"]
        there = right != IGNORE
        return right[there].tolist(), outputs.logits[there].argmax(-1).tolist()

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        return {"accuracy": sum(a == b for a, b in zip(true, said, strict=True)) / len(true)}


class Hiding:
    """What is hidden of a window, and what stands in its place."""

    def __init__(self, share: float, tokenizer: Any, vocabulary: int) -> None:
        self.share, self.token, self.vocabulary = share, tokenizer.mask_token_id, vocabulary
        self.special = frozenset(tokenizer.all_special_ids)

    def __call__(self, ids: Sequence[int], key: str) -> tuple[list[int], list[int]]:
        """(ids with some hidden, what was there: IGNORE where nobody looks). key: what decides."""
        chance = random.Random(key)
        shown, labels = list(ids), [IGNORE] * len(ids)
        open_ = [place for place, token in enumerate(ids) if token not in self.special]
        for place in chance.sample(open_, min(len(open_), max(1, round(self.share * len(open_))))):
            labels[place], drawn = ids[place], chance.random()
            if drawn < 0.8:
                shown[place] = self.token
            elif drawn < 0.9:
                shown[place] = chance.randrange(self.vocabulary)
        return shown, labels
