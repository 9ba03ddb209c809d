"""task: sequence_classification. A label for a text or a pair of texts, several labels, or a number.

Rows as `datasets` and transformers' own examples have them: one or two columns of text and a column `label`,
by name or number. The loss is the cross entropy; of several labels a binary one for each; of a number
(regression) the squared error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data.errors import BadRow, DataError
from ..data.mix import named, sources_of
from ..data.read import read_rows
from ..model.purpose import Purpose
from ..signals.divergence import Divergence
from . import scores
from .base import Task
from .labelled import Labelled, yes_or_no
from .labels import UNKNOWN, Names, label_id, label_values, labels_in
from .rows import Encoded, Encoder, encoded_text, number_of, of_column, text_of

# Columns of text, in the order in which they are looked for: those of GLUE, and the usual ones.
COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text",),
    ("sentence",),
)


class SequenceClassification(Labelled):
    pipeline: ClassVar[str] = "text-classification"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    peft: ClassVar[str | None] = "SEQ_CLS"

    kind: Literal["sequence_classification"] = "sequence_classification"
    text: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = Field(
        default=None,
        description="the column of text, or the two of a pair; null: those of GLUE, text, or sentence",
    )
    label: str = Field(default="label", description="the column of the answer")
    labels: Names | None = Field(
        default=None, description="the labels by name, in their order; null: those that the rows have"
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = Field(
        default="single_label_classification",
        description="one label per row; a list of them; or a number",
    )

    @property
    def regression(self) -> bool:
        return self.problem_type == "regression"

    @property
    def several(self) -> bool:
        return self.problem_type == "multi_label_classification"

    def settled(self, r: Any, config: Mapping[str, Any]) -> Task:
        if self.regression or self.labels is not None or r.data.train is None:
            return self
        return self.model_copy(update={"labels": labels_in(r.data.train, self.label, config)})

    def purpose(self, seed: int) -> Purpose:
        names = ("LABEL_0",) if self.regression else self.labels
        values = {**label_values(names), "problem_type": self.problem_type}
        return Purpose(self.auto, values, seed, relabels=self.trains_head)

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        columns = self.text or _columns(source)

        def encode(row: Mapping[str, Any], _: Path) -> list[Encoded]:
            made = encoded_text(tokenizer, section.sequence_len, *(text_of(row, name) for name in columns))
            return [{**made, "labels": self.answer(row)}]

        return Encoder(encode, self._told, frozenset([*columns, self.label]), filled=True)

    def answer(self, row: Mapping[str, Any]) -> Any:
        """What a row says; BadRow where it says nothing."""
        if self.regression:
            return number_of(row, self.label)
        names = list(self.labels or ())
        value = of_column(row, self.label)
        if not self.several:
            return label_id(value, self.label, names)
        if not isinstance(value, list):
            raise BadRow(f"{self.label!r} must be a list of labels")
        chosen = {label_id(one, self.label, names) for one in value}
        return [float(i in chosen) for i in range(len(names))]

    def _told(self, made: Encoded) -> Iterable[str]:
        names = list(self.labels or ())
        if self.regression:
            return ()
        if self.several:
            return [names[i] for i, there in enumerate(made["labels"]) if there]
        return [names[made["labels"]]]

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        logits, right = outputs.logits.float(), labels["labels"]
        if self.regression:
            return F.mse_loss(logits[:, 0], right.float(), reduction="sum")
        if self.several:
            return F.binary_cross_entropy_with_logits(logits, right.float(), reduction="sum")
        return F.cross_entropy(logits, right, reduction="sum")

    def apart(
        self,
        ours: Tensor,
        theirs: Tensor,
        labels: dict[str, Tensor],
        temperature: float = 1.0,
        kind: Divergence = "forward",
    ) -> Tensor:
        """Of a number the squared error; of several labels a divergence for each, of yes from no."""
        if self.regression:
            return F.mse_loss(ours.float(), theirs.float(), reduction="sum")
        if self.several:
            return super().apart(yes_or_no(ours), yes_or_no(theirs), labels, temperature, kind)
        return super().apart(ours, theirs, labels, temperature, kind)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(batch["labels"].numel())

    def blank(self, windows: int, length: int) -> dict[str, Tensor]:
        shape = (windows, len(self.labels or UNKNOWN)) if self.several else (windows,)
        return {"labels": torch.empty(shape, dtype=torch.int64)}

    def said(
        self, outputs: Any, labels: dict[str, Tensor], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        logits, right = outputs.logits.float(), labels["labels"].tolist()
        if self.regression:
            return right, logits[:, 0].tolist()
        return right, ((logits > 0).float() if self.several else logits.argmax(-1)).tolist()

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        if self.regression:
            return scores.of_numbers(true, said)
        if self.several:
            return scores.of_sets(true, said)
        return scores.of_classes(true, said, len(self.labels or ()))


def _columns(source: Any) -> tuple[str, ...]:
    """The columns of text that the first row has. DataError where it has none of the usual ones."""
    for one in sources_of(source)[:1]:
        first = next((row.value for row in read_rows(one) if row.value is not None), {})
        for columns in COLUMNS:
            if set(columns) <= first.keys():
                return columns
        usual = "; ".join("+".join(columns) for columns in COLUMNS)
        raise DataError(
            f"its columns are {', '.join(first) or 'none'}, and none of the usual ones ({usual}): name the "
            "text in task.text",
            named(source),
        )
    raise AssertionError("no source")
