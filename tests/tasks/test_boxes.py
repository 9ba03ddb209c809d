"""Boxes of rows, and COCO's measures of boxes: by hand, and against the definition written out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_ft.data.errors import BadRow, DataError
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.boxes import Found, average_precision, checked, in_pixels, shares
from lowbit_ft.tasks.labels import found_labels
from tests import detectors

pytest.importorskip("pycocotools")
SECTION = SimpleNamespace(sequence_len=16, on_bad_row="error")


def found(boxes: list[list[float]], classes: list[int], scores: list[float] | None = None) -> Found:
    sure = torch.ones(len(boxes)) if scores is None else torch.tensor(scores)
    return Found(torch.tensor(boxes).reshape(-1, 4), torch.tensor(classes, dtype=torch.int64), sure)


def test_average_precision_by_hand() -> None:
    """Two boxes; one is found, then comes a wrong one, then the other with an overlap of .62. So up to .60
    precision is 1 up to a recall of .5 and 2/3 beyond it, above .60 it is 1 and 0, at 101 recalls."""
    true = [found([[0, 0, 10, 10], [100, 100, 200, 200]], [0, 0])]
    said = [found([[0, 0, 10, 10], [300, 300, 400, 400], [100, 100, 200, 162]], [0, 0, 0], [0.9, 0.8, 0.7])]
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    wanted = {"map": (3 * low + 7 * high) / 10, "map50": low, "map75": high}
    assert average_precision(true, said, 3) == pytest.approx(wanted)
    # a class that is there and never found halves all of it; a picture without boxes changes nothing
    more = [found([[0, 0, 10, 10], [100, 100, 200, 200], [5, 5, 9, 9]], [0, 0, 2]), found([], [])]
    halved = {name: value / 2 for name, value in wanted.items()}
    assert average_precision(more, [*said, found([], [])], 3) == pytest.approx(halved)
    assert average_precision(true, true, 3) == pytest.approx({"map": 1, "map50": 1, "map75": 1})
    assert average_precision(true, [found([], [])], 3) == {"map": 0, "map50": 0, "map75": 0}


@pytest.mark.parametrize("off", [float("nan"), float("inf")])
def test_a_box_that_is_no_number_finds_nothing(off: float) -> None:
    """COCO's evaluation compares `overlap < least`, which of NaN is never true: such a box matches all."""
    true, sure = [found([[0, 0, 10, 10]], [0])], [found([[off] * 4], [0], [0.9])]
    assert average_precision(true, sure, 1)["map"] == 0
    both = [found([[off] * 4, [0, 0, 10, 10]], [0, 0], [0.9, 0.8])]
    assert average_precision(true, both, 1)["map"] == pytest.approx(0.5), "it is a wrong one, and counts"


def test_labels_that_are_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="'cat' more than once"):
        TASKS["object_detection"].model_validate({"kind": "object_detection", "labels": ["cat", "cat"]})


def overlap(a: Tensor, b: Tensor) -> float:
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    both = float((high - low).clamp(min=0).prod())
    return both / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


def slow(true: list[Found], said: list[Found], category: int, least: float) -> float:
    """The definition: by falling score, each box takes the free right one that it overlaps most."""
    count = sum(int((one.classes == category).sum()) for one in true)
    every = [
        (float(s), i, box)
        for i, one in enumerate(said)
        for s, c, box in zip(one.scores, one.classes, one.boxes.double(), strict=True)
        if c == category
    ]
    free = [[b for b, c in zip(x.boxes.double(), x.classes, strict=True) if c == category] for x in true]
    curve, hits = [], 0
    for rank, (_, i, box) in enumerate(sorted(every, key=lambda one: -one[0]), 1):
        best = max(free[i], key=lambda other: overlap(box, other), default=None)
        if best is not None and overlap(box, best) >= least:
            free[i] = [one for one in free[i] if one is not best]
            hits += 1
        curve.append((hits / count, hits / rank))
    points = [max([p for r, p in curve if r >= i / 100 - 1e-12], default=0.0) for i in range(101)]
    return sum(points) / 101


def test_average_precision_is_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)

    def some(count: int) -> Found:
        corner, size = (torch.rand(count, 2, generator=draw, dtype=torch.float64) for _ in range(2))
        boxes = torch.cat([corner * 60, corner * 60 + 10 + size * 30], 1).float()
        return Found(boxes, torch.randint(2, (count,), generator=draw), torch.rand(count, generator=draw))

    true = [some(4) for _ in range(5)]
    said = []
    for one in true:  # half of them are moved right ones
        moved = one.boxes + torch.randn(4, 4, generator=draw) * 3
        other = some(4)
        said.append(
            Found(
                torch.cat([moved, other.boxes]),
                torch.cat([one.classes, other.classes]),
                torch.rand(8, generator=draw),
            )
        )
    made = average_precision(true, said, 2)
    for name, least in (("map50", 0.5), ("map75", 0.75)):
        wanted = sum(slow(true, said, c, least) for c in (0, 1)) / 2
        assert 0.05 < wanted < 0.95 and made[name] == pytest.approx(wanted, abs=1e-9), name
    levels = [slow(true, said, c, 0.5 + 0.05 * i) for c in (0, 1) for i in range(10)]
    assert made["map"] == pytest.approx(sum(levels) / 20, abs=1e-9)


def test_shares_and_back() -> None:
    corners = [3.0, 4.0, 13.0, 24.0]
    assert shares(corners, 40, 80) == [0.2, 0.175, 0.25, 0.25]
    assert in_pixels(torch.tensor([shares(corners, 40, 80)]), 40, 80)[0].tolist() == pytest.approx(corners)


@pytest.mark.parametrize(
    ("box", "form", "said"),
    [
        ([1, 2, 3], "xywh", "a box is four finite numbers"),
        ("no", "xywh", "got 'no'"),
        ([1, 2, 3, float("nan")], "xywh", "four finite numbers"),
        ([True, 2, 3, 4], "xywh", "four finite numbers"),
        ([1, 2, 10**400, 4], "xywh", "four finite numbers"),
        ([1, 2, 0, 4], "xywh", r"\[1, 2, 0, 4\] has no size"),
        ([9, 2, 5, 4], "xyxy", r"has no size \(xyxy; task.box_format\)"),
        ([30, 2, 12, 4], "xywh", "lies outside of its picture of 40 x 20 pixels"),
        ([-2, 2, 12, 4], "xywh", "lies outside"),
        ([40.5, 2, 0.4, 4], "xywh", "nothing of the box"),
    ],
)
def test_what_is_no_box(box: Any, form: str, said: str) -> None:
    with pytest.raises(BadRow, match=said):
        checked(box, "bbox", form, 40, 20)


def test_a_pixel_beyond_the_edge_is_cut_off() -> None:
    assert checked([30, 2, 10.8, 4], "bbox", "xywh", 40, 20) == [30, 2, 40, 6]
    assert checked([1, 2, 3, 4], "bbox", "xyxy", 40, 20) == [1, 2, 3, 4]


def read(path: Path, rows: list[dict[str, Any]], **keys: Any) -> Any:
    given = {"kind": "object_detection", "labels": detectors.LABELS} | keys
    source = SimpleNamespace(path=detectors.write(path / "rows.jsonl", rows), format=None, split="train")
    source = SimpleNamespace(**vars(source), name=None, revision=None, limit=None)
    return TASKS["object_detection"].model_validate(given).examples(source, SECTION, None)


def test_rows_in_every_form(tmp_path: Path) -> None:
    """Lists, objects one by one, columns of the row, corners: the same boxes. A row may have none."""
    rows = detectors.rows(6)
    made, report = read(tmp_path, rows)[0], read(tmp_path, rows).report
    assert len(made["labels"]["boxes"]) == 2 and made["size"] == [48, 40]
    x, y, wide, high = rows[0]["objects"]["bbox"][0]
    middle = [(x + wide / 2) / 48, (y + high / 2) / 40, wide / 48, high / 40]
    assert made["labels"]["boxes"][0] == pytest.approx(middle)
    assert [len(row["labels"]["boxes"]) for row in read(tmp_path, rows)][4] == 0
    assert sum(report.answers.values()) == sum(len(row["objects"]["bbox"]) for row in rows)
    one_by_one = [
        {**r, "objects": [{"bbox": b, "category": c} for b, c in zip(*r["objects"].values(), strict=True)]}
        for r in rows
    ]
    columns = [{"image": r["image"], **r["objects"]} for r in rows]
    corners = [
        {
            "image": r["image"],
            "objects": {
                "box": [[x, y, x + w, y + h] for x, y, w, h in r["objects"]["bbox"]],
                "label": [detectors.LABELS.index(c) for c in r["objects"]["category"]],
            },
        }
        for r in rows
    ]
    digest = read(tmp_path, rows).digest
    assert read(tmp_path, one_by_one).digest == digest
    assert read(tmp_path, columns, objects=None).digest == digest
    assert read(tmp_path, corners, boxes="box", label="label", box_format="xyxy").digest == digest


def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path) -> None:
    good = detectors.rows(2)
    for changed, said in (
        ({"bbox": [[1, 1, 90, 5]], "category": ["red"]}, "lies outside of its picture of 48 x 40"),
        ({"bbox": [[1, 1, 9, 5]], "category": ["pink"]}, "got label 'pink'; allowed: red, green, blue"),
        ({"bbox": [[1, 1, 9, 5]], "category": []}, "two lists of one length; got 1 and 0"),
        ({"bbox": [[1, 1, 9, 5]]}, "key 'category' is missing"),
        ("none", "or a list of such objects; got a string"),
        (["none"], "'objects' must hold objects"),
    ):
        rows = [good[0], {**good[1], "objects": changed}]
        with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{said}"):
            read(tmp_path, rows)


def test_the_names_of_the_rows(tmp_path: Path) -> None:
    path = detectors.write(tmp_path / "rows.jsonl", detectors.rows(12))
    source = SimpleNamespace(path=path, split="train", name=None, revision=None, limit=None)
    assert found_labels(source, "category", {}, "objects") == sorted(detectors.LABELS)
    named = {"id2label": dict(enumerate(detectors.LABELS))}
    assert found_labels(source, "category", named, "objects") == list(detectors.LABELS)
    (tmp_path / "one.jsonl").write_text(json.dumps({"objects": [{"category": 2}, {"category": 0}]}))
    source.path = str(tmp_path / "one.jsonl")
    assert found_labels(source, "category", {}, "objects") == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_stray_number_makes_no_labels(tmp_path: Path) -> None:
    """Of 10**9 a name for each number below it was made."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"objects": {"category": [0, 10**9]}}))
    source = SimpleNamespace(path=str(tmp_path / "one.jsonl"), split="train", name=None, revision=None)
    source.limit = None
    with pytest.raises(DataError, match="holds the label 1000000000, and labels are counted from 0"):
        found_labels(source, "category", {}, "objects")
