"""task: token_classification. A label for every word (entities, parts of speech).

Rows hold a list of words and a list of as many labels, by name or number. The first token of a word carries
its label; its other tokens, like the special ones, carry none, as in transformers' own example.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data.errors import BadRow, DataError
from ..data.windows import IGNORE
from ..model.purpose import Purpose
from . import scores
from .base import Task
from .labelled import Labelled
from .labels import Names, found_labels, label_id, label_values
from .rows import Encoded, Encoder, encoded_text, of_column


class TokenClassification(Labelled):
    pipeline: ClassVar[str] = "token-classification"
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    peft: ClassVar[str | None] = "TOKEN_CLS"

    kind: Literal["token_classification"] = "token_classification"
    words: str = Field(default="tokens", description="the column with the list of words")
    label: str = Field(default="ner_tags", description="the column with the list of their labels")
    labels: Names | None = Field(
        default=None, description="the labels by name, in their order; null: those that the rows have"
    )
    label_all_tokens: bool = Field(
        default=False, description="every token of a word carries its label, not only the first"
    )

    def settled(self, r: Any, config: Mapping[str, Any]) -> Task:
        if self.labels is not None or r.data.train is None:
            return self
        return self.model_copy(update={"labels": tuple(found_labels(r.data.train, self.label, config))})

    def purpose(self, seed: int) -> Purpose:
        return Purpose(self.auto, label_values(self.labels), seed, relabels=self.trains_head)

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "task: token_classification needs a fast tokenizer (tokenizer.json), which says which token "
                "is of which word"
            )
        names = list(self.labels or ())

        def encode(row: Mapping[str, Any], _: Path) -> list[Encoded]:
            words, given = of_column(row, self.words), of_column(row, self.label)
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
                raise BadRow(f"{self.words!r} must be a list of strings, and not empty")
            if not isinstance(given, list) or len(given) != len(words):
                raise BadRow(f"{self.label!r} must be a list of {len(words)} labels, one for each word")
            numbers = [label_id(one, self.label, names) for one in given]
            made = encoded_text(tokenizer, section.sequence_len, words, is_split_into_words=True)
            return [{**made, "labels": self._carried(made.word_ids(), numbers)}]

        return Encoder(encode, self._told, frozenset([self.words, self.label]), filled=True)

    def _carried(self, words: list[int | None], numbers: list[int]) -> list[int]:
        """The label of each token; IGNORE where it carries none."""
        found, before = [], None
        for word in words:
            carries = word is not None and (self.label_all_tokens or word != before)
            found.append(numbers[word] if carries and word is not None else IGNORE)
            before = word
        return found

    def _told(self, made: Encoded) -> Iterable[str]:
        names = list(self.labels or ())
        return [names[number] for number in made["labels"] if number != IGNORE]

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        logits = outputs.logits.float().flatten(0, 1)
        return F.cross_entropy(logits, labels["labels"].flatten(), reduction="sum", ignore_index=IGNORE)

    def answering(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        return logits.flatten(0, 1)[labels["labels"].flatten() != IGNORE]

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    def blank(self, windows: int, length: int) -> dict[str, Tensor]:
        return {"labels": torch.empty((windows, length), dtype=torch.int64)}

    def said(
        self, outputs: Any, labels: dict[str, Tensor], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        right = labels["labels"]
        there = right != IGNORE
        return right[there].tolist(), outputs.logits.argmax(-1)[there].tolist()

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        names = list(self.labels or ())
        return scores.of_tokens(true, said, names.index("O") if "O" in names else None)
