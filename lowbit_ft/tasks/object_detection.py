"""task: object_detection. Boxes around the things of a picture, and what they are.

Rows as `datasets` has COCO: {image, objects: {bbox: [[x, y, width, height], ...], category: [...]}}, the
boxes in pixels of the picture; a list of such objects is the same. Names of columns are keys of the task, and
`objects: null` is for boxes and categories that are columns themselves. A picture may have no box. COCO's own
annotation file is read as such rows (data/coco.py). A region of many things (`iscrowd`) is not learned, and
what is found there is neither right nor wrong, as COCO measures. A box that is a line (a side of 0: COCO's
own files have a few) is not learned either, and counts as one that nothing finds.

The model is one of transformers' AutoModelForObjectDetection (RT-DETR, D-FINE, DETR, YOLOS), and the loss is
its own: its queries are matched to the boxes, and class, distance and overlap are summed behind each layer,
divided by the number of boxes in the batch. So a batch counts its boxes (one at least), and the loss of the
global batch is the mean over them. It needs boxes in fp32, so the model computes in fp32.

Every picture is made one size by the checkpoint's image processor, without regard to its sides (as RT-DETR
does); boxes are shares of it, so they stay what they are. Pictures are shown as they are: nothing is cropped
or flipped at random. A head for other classes in the checkpoint is drawn anew; boxes keep theirs.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..data.errors import BadRow, DataError, kind
from ..data.errors import told as told_of
from ..data.mix import named
from ..data.synthesis.labeller import Labeller
from ..evaluate.perplexity import EvalRow
from ..model.hub import locate
from ..model.images import made_size, picture_of, pixels, problem_of, size_of
from ..model.purpose import Purpose
from ..signals.divergence import Divergence
from ..train.goal import IMAGES, Goal, Pace
from .base import Dense, Feed, Measure, Task
from .batches import Shown
from .boxes import Found, average_precision, checked, corners_of, flat, in_pixels, missing, shares
from .detection_labels import BoxLabeller, own_count
from .image_classification import BESIDE
from .kept import Kept, data_of, read_picture
from .labelled import Answers, Labelled
from .labels import Distinct, categories_of, found_labels, known_labels, label_id, label_values, ordered
from .queries import followed, kept, queries_apart
from .rows import Encoded, Encoder, of_column
from .states import States

Side = Annotated[int, Field(ge=1)]
USUAL_SIZE = (640, 640)  # of the image processors of RT-DETR and D-FINE
CROWDS, FLAT = "crowds", "flat"  # parts of a row that are measured and not learned
APART = {CROWDS: "regions of many things", FLAT: "boxes without a size"}
SHOWN, SURE = 6, 0.5  # pictures that the report draws, and how sure the model is of a box that is drawn


class ObjectDetection(Labelled):
    reads: ClassVar[str] = "images"
    pipeline: ClassVar[str] = "object-detection"
    auto: ClassVar[str] = "AutoModelForObjectDetection"
    peft: ClassVar[str | None] = None
    inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values"})
    unit: ClassVar[str] = "images"

    layered: ClassVar[bool] = False
    states: ClassVar[bool] = True
    measured: ClassVar[int | None] = 16
    walked: ClassVar[bool] = False
    dtype: ClassVar[str | None] = "float32"  # boxes in 16 bits are pixels off

    kind: Literal["object_detection"] = "object_detection"
    image: str = Field(default="image", description="the column of the picture: its bytes, or a path")
    objects: str | None = Field(
        default="objects", description="the column of its boxes and categories; null: they are columns"
    )
    boxes: str = Field(default="bbox", description="the key of the boxes, in pixels")
    label: str = Field(default="category", description="the key of their categories, by name or number")
    crowd: str = Field(
        default="iscrowd",
        description="the key that is 1 of a region of many things, which is not learned; it may be missing",
    )
    box_format: Literal["xywh", "xyxy"] = Field(
        default="xywh",
        description="xywh: left, top, width, height (COCO); xyxy: left, top, right, bottom",
    )
    labels: Annotated[Distinct, Field(min_length=1)] | None = Field(
        default=None, description="the categories by name, in their order; null: those that the rows have"
    )
    image_size: tuple[Side, Side] | None = Field(
        default=None,
        description="height and width of what the image processor makes; null: as the checkpoint's says",
    )

    def settled(self, r: Any, config: Mapping[str, Any]) -> Task:
        made = made_size(locate(str(r.model.path), r.model.revision)[0])
        if self.image_size is not None and made is not None and made != self.image_size:
            raise DataError(
                f"task.image_size: got {list(self.image_size)}, and the image processor of {r.model.path} "
                f"makes {list(made)} (height, width); leave it out, or set size in preprocessor_config.json"
            )
        found: dict[str, Any] = {"image_size": self.image_size or made}
        if self.labels is None and r.data.train is not None:
            listed = categories_of(r.data.train)
            found["labels"] = tuple(
                found_labels(r.data.train, self.label, config, self.objects)
                if listed is None
                else ordered(listed, config)
            )
        elif self.labels is None and (known := known_labels(config)):  # rows are made for them
            found["labels"] = tuple(known)
        return self.model_copy(update=found)

    @property
    def goal(self) -> Goal:
        return States(self)

    @property
    def pace(self) -> Pace:
        return IMAGES

    def purpose(self, seed: int) -> Purpose:
        return Purpose(self.auto, label_values(self.labels), seed, relabels=True, whole=True)

    def labeller(self, processor: Any) -> Labeller:
        return BoxLabeller(self, lambda outputs, sizes, sure: detected(processor, outputs, sizes, sure))

    def missing(self) -> str | None:
        return missing()

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        names = list(self.labels or ())
        if self.box_format != "xywh" and categories_of(source) is not None:
            raise DataError(
                f"task.box_format: got {self.box_format!r} with an annotation file of COCO, whose boxes are "
                "left, top, width, height; set xywh",
                named(source),
            )

        def encode(row: Mapping[str, Any], folder: Path) -> list[Encoded]:
            data, held = read_picture(of_column(row, self.image), self.image, folder)
            if (why := problem_of(data)) is not None:
                raise BadRow(f"{self.image!r} is no picture that Pillow reads ({why})")
            width, height = size_of(data)
            for side, there in (("width", width), ("height", height)):
                if row.get(side, there) not in (there, None):
                    raise BadRow(
                        f"{side} is {told_of(row[side])}, and its picture is {width} x {height}: its boxes "
                        "are of another picture, or of this one before it was turned or made smaller"
                    )
            boxes, given, crowds = self._given(row)
            lines = [flat(box, self.box_format) for box in boxes]
            corners = [
                corners_of(box, self.box_format)
                if line
                else checked(box, self.boxes, self.box_format, width, height)
                for box, line in zip(boxes, lines, strict=True)
            ]
            classes = [label_id(one, self.label, names) for one in given]
            made: Encoded = {"image": held, "labels": {"class_labels": [], "boxes": []}}
            made["size"], apart = [width, height], Counter[str]()
            for corner, category, many, line in zip(corners, classes, crowds, lines, strict=True):
                part = CROWDS if many else FLAT if line else "labels"
                if part != "labels":
                    made.setdefault(part, {"class_labels": [], "boxes": []})
                    apart[f"{APART[part]} ({self.crowd if many else self.boxes})"] += 1
                made[part]["class_labels"].append(category)
                made[part]["boxes"].append(shares(corner, width, height))
            return [{**made, "apart": apart} if apart else made]

        keys = [self.boxes, self.label, self.crowd] if self.objects is None else [self.objects]
        told = lambda made: [names[i] for i in made["labels"]["class_labels"]]  # noqa: E731
        return Encoder(encode, told, frozenset([self.image, "width", "height", *keys]) | BESIDE)

    def _given(self, row: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[bool]]:
        """The boxes and the categories of a row, as they are there, and which are regions of many. BadRow."""
        found = row if self.objects is None else of_column(row, self.objects)
        if isinstance(found, list):  # of objects, one by one
            if not all(isinstance(one, dict) for one in found):
                raise BadRow(f"{self.objects!r} must hold objects with {self.boxes!r} and {self.label!r}")
            found = {
                **{key: [of_column(one, key) for one in found] for key in (self.boxes, self.label)},
                self.crowd: [one.get(self.crowd, 0) for one in found],
            }
        if not isinstance(found, Mapping):
            raise BadRow(
                f"{self.objects!r} must be {{{self.boxes!r}: [...], {self.label!r}: [...]}}, or a list of "
                f"such objects; got {kind(found)}"
            )
        boxes, given = of_column(found, self.boxes), of_column(found, self.label)
        if not isinstance(boxes, list) or not isinstance(given, list) or len(boxes) != len(given):
            counts = [len(v) if isinstance(v, list) else kind(v) for v in (boxes, given)]
            raise BadRow(
                f"{self.boxes!r} and {self.label!r} must be two lists of one length; got {counts[0]} and "
                f"{counts[1]}"
            )
        crowds = found.get(self.crowd, [0] * len(boxes))
        if not isinstance(crowds, list) or len(crowds) != len(boxes) or any(c not in (0, 1) for c in crowds):
            raise BadRow(
                f"{self.crowd!r} must be a list of 0 and 1, one for each box; got {str(crowds)[:60]}"
            )
        return boxes, given, [bool(one) for one in crowds]

    def shown(self, tokenizer: Any, model: Any) -> Shown:
        """tokenizer: the image processor."""
        return lambda row, key: {
            "pixel_values": pixels(tokenizer, picture_of(data_of(row["image"]))),
            "labels": as_tensors(row["labels"]),
        }

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        """Up to what the loss is made of: matching looks at numbers, and there are none. The queries that
        some models add while they train (RT-DETR's denoising) come of the boxes, and are not there."""
        made = self.image_size or made_size(Path(model.config._name_or_path)) or USUAL_SIZE
        outputs = model(pixel_values=torch.empty((windows, 3, *made)))
        if not loss:
            return outputs
        every = [v for v in outputs.values() if isinstance(v, Tensor) and v.requires_grad]
        return torch.stack([value.float().sum() for value in every]).sum()

    def outputs(self, model: Callable[..., Any], inputs: Mapping[str, Any], labels: Mapping[str, Any]) -> Any:
        with own_count():
            return model(**inputs, labels=labels["labels"])

    def reply(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        return model(**inputs)

    def between(
        self,
        ours: Any,
        theirs: Any,
        labels: dict[str, Any],
        temperature: float = 1.0,
        kind: Divergence = "forward",
    ) -> Tensor:
        """Of classes and boxes, query by query (queries.py)."""
        softmax = theirs.logits.shape[-1] > len(self.labels or ())  # one class more: no object
        return queries_apart(ours, theirs, softmax, temperature, kind)

    def beside(self, first: Callable[[], Any], *others: Callable[[], Any]) -> list[Any]:
        choices: list[Tensor] = []
        with kept(choices):
            said = [first()]
        for other in others:
            with followed(choices):
                said.append(other())
        return said

    def loss(self, outputs: Any, labels: dict[str, Any]) -> Tensor:
        return outputs.loss * self.count(labels).to(outputs.loss.device)

    def count(self, batch: dict[str, Any]) -> Tensor:
        """Of the boxes, one at least: by what the models divide."""
        return torch.tensor(max(1, sum(len(one["boxes"]) for one in batch["labels"])))

    def said(self, outputs: Any, labels: dict[str, Any], rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return [], []  # boxes are made by the image processor: Detections

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        return average_precision(true, said, len(self.labels or ()))

    def measure(self, feed: Feed, source: Any, model: Any, dense: Dense, rows: int | None) -> Measure:
        found = self.examples(source, feed.r.data, feed.tokenizer, rows=rows)
        return Detections(self, feed, self.first(found, feed.r.eval.windows), model, dense)


class Detections(Answers):
    """The loss, and how well boxes are found: all that the image processor makes of the model's answers."""

    def __init__(self, task: ObjectDetection, feed: Feed, chosen: Any, model: Any, dense: Dense) -> None:
        super().__init__(task, feed, chosen, model, dense, task.measured)
        self.processor, self.names = feed.tokenizer, list(task.labels or ())
        self.seen: list[Found] = []
        self.found = {"true": [right(row) for row in chosen[:SHOWN]]}

    def said(self, outputs: Any, labels: dict[str, Any], rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        made = detected(self.processor, outputs, [row["size"] for row in rows])
        self.seen += made[: max(0, SHOWN - len(self.seen))]
        return [judged(row) for row in rows], made

    def loss(self, outputs: Any, labels: dict[str, Any]) -> Tensor | None:
        """A graph has logits and boxes, and no loss."""
        return self.task.loss(outputs, labels) if hasattr(outputs, "loss") else None

    def row(self, model: Any, stage: str) -> EvalRow:
        self.seen = []
        row = super().row(model, stage)
        self.found[stage] = [one.above(SURE) for one in self.seen]
        return row

    def files(self) -> dict[str, Any]:
        pictures = [
            {
                "image": _png(row["image"]),
                "size": row["size"],
                "boxes": {stage: _listed(some[i]) for stage, some in self.found.items()},
            }
            for i, row in enumerate(self.rows[:SHOWN])
        ]
        return {"boxes.json": {"names": self.names, "confidence": SURE, "pictures": pictures}}


def _png(held: Kept | bytes) -> str:
    """A picture for the report, in base64, made smaller where it is large."""
    image, file = picture_of(data_of(held)), io.BytesIO()
    image.thumbnail((640, 640))
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _listed(found: Found) -> list[list[float]]:
    rows = zip(found.boxes.tolist(), found.classes.tolist(), found.scores.tolist(), strict=True)
    return [[*box, category, score] for box, category, score in rows]


def as_tensors(labels: Mapping[str, Any]) -> dict[str, Tensor]:
    """{class_labels: [...], boxes: [[cx, cy, w, h], ...]} -> as the models take them: int64 [n], fp32 [n,
    4]."""
    return {
        "class_labels": torch.tensor(labels["class_labels"], dtype=torch.int64),
        "boxes": torch.tensor(labels["boxes"], dtype=torch.float32).reshape(-1, 4),
    }


def right(row: Mapping[str, Any]) -> Found:
    """The boxes of a row."""
    made, (width, height) = as_tensors(row["labels"]), row["size"]
    boxes = in_pixels(made["boxes"], width, height)
    return Found(boxes, made["class_labels"], torch.ones(len(boxes)))


def judged(row: Mapping[str, Any]) -> Found:
    """The boxes of a row, those without a size, and its regions of many things behind them."""
    parts = [right({**row, "labels": row[name]}) for name in ("labels", FLAT, CROWDS) if name in row]
    count = sum(len(one.boxes) for one in parts)
    return Found(
        torch.cat([one.boxes for one in parts]),
        torch.cat([one.classes for one in parts]),
        torch.cat([one.scores for one in parts]),
        torch.arange(count) >= count - len(row.get(CROWDS, {"boxes": []})["boxes"]),
    )


def detected(
    processor: Any, outputs: Any, sizes: Sequence[tuple[int, int]], confidence: float = 0.0
) -> list[Found]:
    """What a model found in each picture of a batch, of which it is surer than `confidence` (0 to 1), by its
    image processor. sizes: (width, height) of the pictures, in whose pixels the boxes are."""
    high_wide = torch.tensor([[height, width] for width, height in sizes])
    made = processor.post_process_object_detection(outputs, confidence, high_wide.to(outputs.logits.device))
    return [
        Found(one["boxes"].float().cpu(), one["labels"].cpu(), one["scores"].float().cpu()) for one in made
    ]
