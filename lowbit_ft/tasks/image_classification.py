"""task: image_classification. A label for a picture.

Rows as `datasets` has them: {image, label}, of a parquet file (the bytes of the picture in it), of a folder
of pictures whose folders are the labels, or of any rows whose `image` is the path of a file. A file is read
when its row is, to be checked, and again by the batch that shows it, as from the table of a data set; the
bytes in a parquet file are held in memory. The checkpoint's image processor does the rest.

What cuts a picture into patches is a convolution: it stays dense, as it came, and so do positions. Everything
behind it is linears. Pictures are shown as they are: nothing is cropped or flipped at random.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data.errors import BadRow
from ..data.synthesis.labeller import Labeller
from ..model.images import picture_of, pixels, problem_of
from ..model.purpose import Purpose, example_of
from ..train.goal import IMAGES, Goal, Pace
from . import scores
from .base import Task
from .batches import Shown
from .kept import data_of, read_picture
from .labelled import Labelled
from .labels import Names, known_labels, label_id, label_values, labels_in
from .rows import Encoded, Encoder, of_column
from .states import States

BESIDE = frozenset({"row", "about"})  # what a synthesis says of a row of its own
TOGETHER = 32  # pictures that are measured together


class ImageClassification(Labelled):
    reads: ClassVar[str] = "images"
    pipeline: ClassVar[str] = "image-classification"
    auto: ClassVar[str] = "AutoModelForImageClassification"
    peft: ClassVar[str | None] = None
    inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values"})
    unit: ClassVar[str] = "images"

    layered: ClassVar[bool] = False
    states: ClassVar[bool] = True

    kind: Literal["image_classification"] = "image_classification"
    image: str = Field(default="image", description="the column of the picture: its bytes, or a path")
    label: str = Field(default="label", description="the column of the answer")
    labels: Names | None = Field(
        default=None, description="the labels by name, in their order; null: those that the rows have"
    )

    @property
    def goal(self) -> Goal:
        return States(self)

    def settled(self, r: Any, config: Mapping[str, Any]) -> Task:
        if self.labels is None and r.data.train is None and known_labels(config):  # rows are made for them
            return self.model_copy(update={"labels": tuple(known_labels(config))})
        if self.labels is not None or r.data.train is None:
            return self
        return self.model_copy(update={"labels": labels_in(r.data.train, self.label, config)})

    @property
    def pace(self) -> Pace:
        return IMAGES

    def purpose(self, seed: int) -> Purpose:
        return Purpose(self.auto, label_values(self.labels), seed, relabels=self.trains_head)

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        names = list(self.labels or ())

        def encode(row: Mapping[str, Any], folder: Path) -> list[Encoded]:
            data, held = read_picture(of_column(row, self.image), self.image, folder)
            if (why := problem_of(data)) is not None:
                raise BadRow(f"{self.image!r} is no picture that Pillow reads ({why})")
            return [{"image": held, "labels": label_id(of_column(row, self.label), self.label, names)}]

        reads = frozenset([self.image, self.label, *BESIDE])
        return Encoder(encode, lambda made: [names[made["labels"]]], reads)

    def shown(self, tokenizer: Any, model: Any) -> Shown:
        """tokenizer: the image processor."""
        return lambda row, key: {
            "pixel_values": pixels(tokenizer, picture_of(data_of(row["image"]))),
            "labels": row["labels"],
        }

    def labeller(self, processor: Any) -> Labeller:
        return ClassLabeller(self)

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        image = example_of(model.config.to_dict(), self.purpose(0))["pixel_values"]
        outputs = model(pixel_values=torch.empty((windows, *image.shape[1:])))
        return self.loss(outputs, {"labels": torch.empty(windows, dtype=torch.int64)}) if loss else outputs

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs.logits.float(), labels["labels"], reduction="sum")

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def said(
        self, outputs: Any, labels: dict[str, Tensor], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        return labels["labels"].tolist(), outputs.logits.argmax(-1).tolist()

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        return scores.of_classes(true, said, len(self.labels or ()))


class ClassLabeller(Labeller):
    """An answer is the number of a label."""

    def __init__(self, task: ImageClassification):
        self.task = task

    def drawn(self, number: int, chance: random.Random) -> int:
        return number % len(self.names)  # evenly; nothing is known of how often each is there

    def loss(self, model: Any, images: Tensor, answers: Sequence[int]) -> Tensor:
        logits = model(pixel_values=images).logits.float()
        return F.cross_entropy(logits, torch.tensor(answers, device=logits.device))

    def own(self, model: Any, images: Tensor, confidence: float) -> list[int | None]:
        sure, best = model(pixel_values=images).logits.float().softmax(-1).max(-1)
        return [b if p >= confidence else None for b, p in zip(best.tolist(), sure.tolist(), strict=True)]

    def revised(
        self, model: Any, images: Tensor, answers: Sequence[int], confidence: float, overlap: float
    ) -> list[int]:
        said = self.own(model, images, confidence)
        return [old if new is None else new for old, new in zip(answers, said, strict=True)]

    def columns(self, answer: int, width: int, height: int) -> dict[str, Any]:
        return {self.task.label: self.names[answer]}

    def answer(self, row: Mapping[str, Any]) -> int:
        return self.names.index(row[self.task.label])

    @property
    def image(self) -> str:
        return self.task.image

    def words(self, answer: int) -> list[str]:
        return [self.names[answer]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.task.labels or ()

    def score(self, model: Any, images: Iterable[Tensor], answers: Sequence[int]) -> Mapping[str, float]:
        like, said, left = next(model.parameters()), list[int](), iter(images)
        while several := list(islice(left, TOGETHER)):
            some = torch.stack(several).to(like.device, like.dtype)
            said += model(pixel_values=some).logits.argmax(-1).tolist()
        right = sum(a == b for a, b in zip(said, answers, strict=True))
        return {"accuracy": right / max(1, len(said))}
