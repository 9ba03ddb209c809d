"""How a detector answers, for images that it makes itself (data.synthesis task_images).

An answer is the boxes of one image, as they are learned: (classes, boxes as shares, cxcywh). Adaptive label
sampling (arXiv 2507.16782) starts from one random box,

    w, h ~ U(0.2, 0.8)     cx = 1/2 +- (1/2 - w/2) U(0, 1), cy alike     class even

and looks, while an image is made for the boxes y, at the boxes D that the model is sure of there (after
suppression of those that overlap a surer one):

    add   d of D        with max over y of IoU(d, y) < overlap, and of 1 % to 85 % of the image
    drop  y of several  with max over D of IoU(d, y) < overlap; if that were all, the best one stays
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data.synthesis.labeller import Labeller
from .boxes import Found, average_precision, checked, in_pixels, shares
from .labels import label_id

SUPPRESSED = 0.6  # IoU with a surer box, from which on a box is the same one (yolo's setting in the release)
AREAS = (0.01, 0.85)  # shares of the image that a box may be, to be added
TOGETHER = 16  # images that are measured together
Answer = tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]
Detect = Callable[[Any, Sequence[tuple[int, int]], float], list[Found]]  # (outputs, sizes, confidence)


class BoxLabeller(Labeller):
    """task: an ObjectDetection, whose keys name the columns. detect: what its image processor makes of
    outputs."""

    def __init__(self, task: Any, detect: Detect):
        self.task, self.detect = task, detect

    def drawn(self, number: int, chance: random.Random) -> Answer:
        w, h = chance.uniform(0.2, 0.8), chance.uniform(0.2, 0.8)
        cx, cy = (0.5 + chance.choice((-1, 1)) * (0.5 - side / 2) * chance.random() for side in (w, h))
        return (chance.randrange(len(self.names)),), ((cx, cy, w, h),)

    def loss(self, model: Any, images: Tensor, answers: Sequence[Answer]) -> Tensor:
        """The model's own loss; it is the mean over the boxes."""
        with own_count():
            return model(pixel_values=images, labels=[_tensors(one, images.device) for one in answers]).loss

    def found(self, model: Any, images: Tensor, confidence: float) -> list[Answer]:
        """What the model is sure of in each image; no box where that is nothing."""
        height, width = images.shape[2:]
        made = self.detect(model(pixel_values=images), [(width, height)] * len(images), confidence)
        return [_alone(one, width, height) for one in made]

    def own(self, model: Any, images: Tensor, confidence: float) -> list[Answer | None]:
        return [answer if answer[0] else None for answer in self.found(model, images, confidence)]

    def revised(
        self, model: Any, images: Tensor, answers: Sequence[Answer], confidence: float, overlap: float
    ) -> list[Answer]:
        seen = self.found(model, images, confidence)
        return [moved(old, new, overlap) for old, new in zip(answers, seen, strict=True)]

    def columns(self, answer: Answer, width: int, height: int) -> dict[str, Any]:
        task, (classes, boxes) = self.task, answer
        corners = in_pixels(torch.tensor(boxes, dtype=torch.float64), width, height)
        if task.box_format == "xywh":
            corners = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        rows = [[round(n, 4) for n in box] for box in corners.tolist()]
        found = {task.boxes: rows, task.label: [self.names[i] for i in classes]}
        return found if task.objects is None else {task.objects: found}

    def answer(self, row: Mapping[str, Any]) -> Answer:
        task = self.task
        found = row if task.objects is None else row[task.objects]
        width, height = row["about"]["size"]
        corners = [checked(box, task.boxes, task.box_format, width, height) for box in found[task.boxes]]
        classes = [label_id(one, task.label, list(self.names)) for one in found[task.label]]
        return tuple(classes), tuple(tuple(shares(one, width, height)) for one in corners)

    @property
    def image(self) -> str:
        return self.task.image

    def words(self, answer: Answer) -> list[str]:
        return [self.names[i] for i in answer[0]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.task.labels or ()

    def score(self, model: Any, images: Iterable[Tensor], answers: Sequence[Answer]) -> Mapping[str, float]:
        like, said, sizes = next(model.parameters()), list[Found](), list[tuple[int, int]]()
        left = iter(images)
        while several := list(islice(left, TOGETHER)):
            here = [(image.shape[2], image.shape[1]) for image in several]
            some = torch.stack(several).to(like.device, like.dtype)
            said += self.detect(model(pixel_values=some), here, 0.0)
            sizes += here
        right = [
            Found(in_pixels(torch.tensor(boxes), *size), torch.tensor(classes), torch.ones(len(classes)))
            for (classes, boxes), size in zip(answers, sizes, strict=True)
        ]
        return average_precision(right, said, len(self.names))


@contextmanager
def own_count() -> Iterator[None]:
    """Inside, a model divides its loss by the boxes of its own batch. DETR and its kin divide by those of all
    processes where accelerate knows of some: not what a task counts, and a wait for processes that do not
    evaluate."""
    from accelerate import PartialState

    before = PartialState.__dict__["_shared_state"]
    PartialState._shared_state = {}  # what their loss asks
    try:
        yield
    finally:
        PartialState._shared_state = before


def _tensors(answer: Answer, device: torch.device) -> dict[str, Tensor]:
    classes, boxes = answer
    return {
        "class_labels": torch.tensor(classes, dtype=torch.int64, device=device),
        "boxes": torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4),
    }


def _alone(found: Found, width: int, height: int) -> Answer:
    """Boxes in pixels -> those that overlap no surer one, cut to the image, without slivers."""
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = found.boxes.clamp(min=0).minimum(size)
    order = found.scores.argsort(descending=True, stable=True).tolist()
    overlaps, kept = iou(boxes, boxes), list[int]()
    for i in order:
        sides = boxes[i, 2:] - boxes[i, :2]
        if bool((sides >= 1).all()) and all(overlaps[i, j] < SUPPRESSED for j in kept):
            kept.append(i)
    corners = [[float(n) for n in boxes[i]] for i in kept]
    classes = tuple(int(found.classes[i]) for i in kept)
    return classes, tuple(tuple(shares(one, width, height)) for one in corners)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """xyxy [n, 4], [m, 4] -> the area of the intersections by that of the unions, [n, m]; 0 of empty ones."""
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return both / (areas[0][:, None] + areas[1] - both).clamp(min=1e-12)


def moved(old: Answer, seen: Answer, overlap: float) -> Answer:
    """Boxes after a look at what the model sees (above). There is one at least, as before."""
    if not seen[0] or not old[0]:
        return old
    here, there = (in_pixels(torch.tensor(boxes), 1, 1) for _, boxes in (old, seen))
    overlaps = iou(there, here)  # [seen, old]
    areas = torch.tensor(seen[1])[:, 2:].prod(-1)
    new = (overlaps.amax(1) < overlap) & (areas > AREAS[0]) & (areas < AREAS[1])
    best = overlaps.amax(0)
    stays = best >= overlap if len(old[0]) > 1 else torch.ones(1, dtype=torch.bool)
    if not stays.any():
        stays[best.argmax()] = True
    pairs = [
        *((c, b) for c, b, yes in zip(*old, stays.tolist(), strict=True) if yes),
        *((c, b) for c, b, yes in zip(*seen, new.tolist(), strict=True) if yes),
    ]
    return tuple(c for c, _ in pairs), tuple(b for _, b in pairs)
