"""Boxes of a picture: as rows have them, as detectors learn them, and how well they are found.

    xywh   x and y of the left upper corner, width and height, in pixels      (COCO, and `datasets`)
    xyxy   the left upper and the right lower corner, in pixels
    cxcywh the centre, width and height, as shares of the picture's            (what a detector is trained on)

Found boxes are measured as COCO does, by its own evaluation (`pip install 'lowbit-ft[tasks]'`, pycocotools):

    map    the mean over the classes, and over the overlaps .50, .55, ... .95 by which a box counts as found,
           of the average precision            map50, map75: at one overlap
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.coco import finite
from ..data.errors import BadRow, told

SLACK = 1.0  # pixels by which a box may leave the picture: annotations are rounded; what is beyond is cut off
FORMATS = ("xywh", "xyxy")


@dataclass(frozen=True)
class Found:
    """Boxes of one picture, xyxy in pixels [n, 4] fp32, their classes [n] int64, and of a model how sure it
    is of each, [n] fp32 (ones where they are the right ones). crowd: which are regions of many things, [n]
    bool; None: none."""

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    crowd: Tensor | None = None

    def above(self, confidence: float) -> Found:
        kept = self.scores > confidence
        crowd = None if self.crowd is None else self.crowd[kept]
        return Found(self.boxes[kept], self.classes[kept], self.scores[kept], crowd)


def missing() -> str | None:
    """Why boxes cannot be measured here, with the way out; None when they can."""
    if importlib.util.find_spec("pycocotools") is not None:
        return None
    return (
        "boxes are measured by COCO's own evaluation, which is not installed (pycocotools); pip install "
        "'lowbit-ft[tasks]'"
    )


def checked(value: Any, column: str, form: str, width: int, height: int) -> list[float]:
    """A box of a row -> [x0, y0, x1, y1] in pixels, inside the picture. BadRow for what is no box of it."""
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or not all(map(finite, numbers)):
        raise BadRow(f"{column!r}: a box is four finite numbers ({form}, in pixels); got {_box(value)}")
    x0, y0, x1, y1 = corners_of(numbers, form)
    if x1 <= x0 or y1 <= y0:
        raise BadRow(f"{column!r}: the box {_box(value)} has no size ({form}; task.box_format)")
    if min(x0, y0) < -SLACK or x1 > width + SLACK or y1 > height + SLACK:
        raise BadRow(
            f"{column!r}: the box {_box(value)} lies outside of its picture of {width} x {height} pixels "
            f"({form}; task.box_format)"
        )
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if x1 <= x0 or y1 <= y0:
        raise BadRow(f"{column!r}: nothing of the box {_box(value)} lies in its picture")
    return [x0, y0, x1, y1]


def flat(value: Any, form: str) -> bool:
    """Whether a box is a line or a point, as a few of COCO's own are: a side of it has no length."""
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(map(finite, value)):
        return False
    x0, y0, x1, y1 = value if form == "xyxy" else (0, 0, *value[2:])
    return min(x1 - x0, y1 - y0) == 0


def corners_of(box: Sequence[float], form: str) -> list[float]:
    """A box of a row -> [x0, y0, x1, y1], wherever that is."""
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x0 + x1, y0 + y1] if form == "xywh" else [x0, y0, x1, y1]


def _box(value: Any) -> str:
    return str(list(value))[:80] if isinstance(value, list | tuple) else told(value)


def shares(corners: Sequence[float], width: int, height: int) -> list[float]:
    """xyxy in pixels -> cxcywh."""
    x0, y0, x1, y1 = corners
    return [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]


def in_pixels(boxes: Tensor, width: int, height: int) -> Tensor:
    """cxcywh [n, 4] -> xyxy in pixels."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    scale = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    return torch.cat([centre - size / 2, centre + size / 2], 1) * scale


def average_precision(true: Sequence[Found], said: Sequence[Found], classes: int) -> dict[str, float]:
    """map, map50 and map75 over pictures; 0 where nothing is found. Classes that no picture has do not
    count; where none has a box at all, 0. What lies in a region of many things (of the right ones, `crowd`)
    is neither right nor wrong, and nothing is missed there."""
    from pycocotools.coco import COCO  # optional: only measuring needs it
    from pycocotools.cocoeval import COCOeval

    zeros = {"map": 0.0, "map50": 0.0, "map75": 0.0}
    right = [one for i, found in enumerate(true) for one in _rows(i, found)]
    given = [one for i, found in enumerate(said) for one in _rows(i, found)]
    if not right or not given:
        return zeros
    for number, row in enumerate(right, 1):
        row["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        data: Any = COCO()
        data.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(true))],
            "categories": [{"id": i, "name": str(i)} for i in range(classes)],
            "annotations": right,
        }
        data.createIndex()
        measured = COCOeval(data, data.loadRes(given), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return {name: max(0.0, float(measured.stats[i])) for i, name in enumerate(zeros)}


def _rows(picture: int, found: Found) -> list[dict[str, Any]]:
    """COCO's rows of the boxes of a picture. One that is no number is nowhere: COCO's evaluation takes an
    overlap that is none for a match, with every box."""
    known = found.boxes.isfinite().all(1, keepdim=True)
    boxes = found.boxes.where(known, 0.0)
    rows = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double().tolist()
    crowd = [0] * len(rows) if found.crowd is None else found.crowd.long().tolist()
    given = zip(rows, found.classes.tolist(), found.scores.tolist(), crowd, strict=True)
    return [
        {
            "image_id": picture,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": many,
        }
        for box, category, score, many in given
    ]
