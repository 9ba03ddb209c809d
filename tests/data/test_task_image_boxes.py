"""data.synthesis task_images, the boxes of a detector: how adaptive labels move, how they are stored
and read, where random ones lie."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.detection_labels import BoxLabeller, iou, moved

SHAPES = ("circle", "square", "triangle", "cross")


def boxes_of(**keys: Any) -> BoxLabeller:
    given = {"kind": "object_detection", "labels": ["a", "b"], **keys}
    found = TASKS["object_detection"].model_validate(given).labeller(None)
    assert isinstance(found, BoxLabeller)
    return found


Box = st.tuples(st.floats(0.25, 0.75), st.floats(0.25, 0.75), st.floats(0.1, 0.5), st.floats(0.1, 0.5))
Answers = st.lists(st.tuples(st.integers(0, 1), Box), min_size=1, max_size=4).map(
    lambda pairs: (tuple(c for c, _ in pairs), tuple(b for _, b in pairs))
)


def plain_iou(a: Any, b: Any) -> float:
    def sides(box: Any) -> tuple[float, float, float, float]:
        x, y, w, h = box
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2

    (ax, ay, aX, aY), (bx, by, bX, bY) = sides(a), sides(b)
    both = max(0.0, min(aX, bX) - max(ax, bx)) * max(0.0, min(aY, bY) - max(ay, by))
    return both / (a[2] * a[3] + b[2] * b[3] - both)


@settings(max_examples=80, deadline=None)
@given(old=Answers, seen=Answers, overlap=st.sampled_from([0.2, 0.35, 0.6]))
def test_boxes_move_by_the_rule(old: Any, seen: Any, overlap: float) -> None:
    """Add, drop, keep the best: the rule, box by box; one box is left at least."""
    found = moved(old, seen, overlap)
    table = [[plain_iou(d, y) for y in old[1]] for d in seen[1]]
    near = [abs(v - overlap) < 1e-4 for row in table for v in row]
    if any(near):
        return  # the two roundings may differ there
    best = [max(row[j] for row in table) for j in range(len(old[1]))]
    kept = [j for j in range(len(best)) if len(best) == 1 or best[j] >= overlap]
    kept = kept or [best.index(max(best))]
    new = [i for i, row in enumerate(table) if max(row) < overlap and seen[1][i][2] * seen[1][i][3] > 0.01]
    assert found[1] == tuple([*(old[1][j] for j in kept), *(seen[1][i] for i in new)])
    assert len(found[0]) == len(found[1]) >= 1
    assert moved(old, ((), ()), overlap) == old


@settings(max_examples=30, deadline=None)
@given(answer=Answers, form=st.sampled_from(["xywh", "xyxy"]), objects=st.sampled_from(["objects", None]))
def test_boxes_are_read_as_they_were_stored(answer: Any, form: str, objects: str | None) -> None:
    by = boxes_of(box_format=form, objects=objects)
    classes, boxes = by.answer({**by.columns(answer, 64, 48), "about": {"size": [64, 48]}})
    assert classes == answer[0] and np.allclose(boxes, answer[1], atol=1e-4)


def test_random_boxes_lie_in_the_image() -> None:
    made = [boxes_of().drawn(n, random.Random(n))[1][0] for n in range(300)]
    corners = torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in made])
    assert 0 <= corners.min() and corners.max() <= 1
    assert all(0.2 <= side <= 0.8 for box in made for side in box[2:])
    assert torch.allclose(iou(corners, corners).diagonal(), torch.ones(300))
