"""COCO's annotation files as rows of a detector: crowds, categories, and COCO's measure of the same file."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit_ft.data.errors import DataError
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.boxes import Found, average_precision
from lowbit_ft.tasks.object_detection import judged, right
from tests import detectors

pytest.importorskip("pycocotools")
IDS = {"red": 2, "green": 40, "blue": 7}  # their numbers have gaps and another order
ORDER = ("red", "blue", "green")  # of these numbers


def task(**keys: Any) -> Any:
    return TASKS["object_detection"].model_validate({"kind": "object_detection", "labels": ORDER} | keys)


def source(path: Path, **keys: Any) -> Any:
    return SimpleNamespace(
        **{"path": str(path), "split": "train", "name": None, "revision": None, "limit": None} | keys
    )


def examples(path: Path, skip: bool = False, **keys: Any) -> Any:
    section = SimpleNamespace(sequence_len=16, on_bad_row="skip" if skip else "error")
    return task(**keys).examples(source(path), section, None)


def test_rows_of_coco_are_those_of_datasets(tmp_path: Path) -> None:
    """The same pictures, boxes and labels; a region of many things is in neither."""
    found = detectors.rows(6)
    file = detectors.coco(tmp_path, found, "some")
    made = examples(file)
    plain = detectors.write(tmp_path / "rows.jsonl", found)
    assert made.digest == examples(Path(plain)).digest and len(made) == 6
    content = json.loads(file.read_text())
    whole = {"image_id": content["images"][0]["id"], "category_id": 7, "bbox": [0, 0, 48, 40]}
    content["annotations"].insert(0, {"id": 999, **whole, "iscrowd": 1})
    file.write_text(json.dumps(content))
    crowded = examples(file)
    assert crowded[0]["labels"] == made[0]["labels"] and crowded[1] == made[1]
    assert len(right(crowded[0]).boxes) == 2
    crowd = judged(crowded[0]).crowd
    assert crowd is not None and crowd.tolist() == [False, False, True]
    assert judged(crowded[0]).boxes[2].tolist() == [0, 0, 48, 40] and judged(crowded[0]).classes[2] == 1
    assert "not learned: 1 regions of many things (iscrowd)" in str(crowded.report)
    assert "not learned" not in str(made.report) and "columns not read" not in str(crowded.report)
    rows = [{**found[0], "objects": {**found[0]["objects"], "iscrowd": [1, 0]}}]
    assert len(examples(Path(detectors.write(tmp_path / "other.jsonl", rows)))[0]["labels"]["boxes"]) == 1
    rows[0]["objects"]["iscrowd"] = [1, 2]
    with pytest.raises(DataError, match="'iscrowd' must be a list of 0 and 1, one for each box"):
        examples(Path(detectors.write(tmp_path / "other.jsonl", rows)))


def test_a_box_that_is_a_line_is_counted_and_not_learned(tmp_path: Path) -> None:
    """COCO's own train2017 has a few, and is read as it is. COCO measures them: nothing finds them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = detectors.rows(3)
    file = detectors.coco(tmp_path, found, "some")
    before = examples(file)
    content = json.loads(file.read_text())
    line = {"image_id": content["images"][0]["id"], "category_id": 7, "iscrowd": 0, "area": 0.0}
    content["annotations"].insert(1, {**line, "id": 999, "bbox": [9.65, 8.33, 1.03, 0]})
    file.write_text(json.dumps(content))
    made = examples(file)
    assert made[0]["labels"] == before[0]["labels"] and made[1] == before[1]
    assert "not learned: 1 boxes without a size (bbox)" in str(made.report)
    said = [right(row) for row in made]
    ours = average_precision([judged(row) for row in made], said, 3)
    rows = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in content["annotations"]
        if a["id"] != 999
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        read: Any = COCO(str(file))
        measured = COCOeval(read, read.loadRes(rows), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    assert list(ours.values()) == pytest.approx(measured.stats[:3].tolist(), abs=1e-6) and ours["map"] < 1
    corners = [{**found[0], "objects": {"bbox": [[3, 4, 3, 9], [3, 4, 9, 9]], "category": ["red", "red"]}}]
    plain = examples(Path(detectors.write(tmp_path / "rows.jsonl", corners)), box_format="xyxy")
    assert len(plain[0]["labels"]["boxes"]) == 1 and plain.report.apart.total() == 1


def test_what_is_refused(tmp_path: Path) -> None:
    file = detectors.coco(tmp_path, detectors.rows(3), "some")
    with pytest.raises(DataError, match="box_format: got 'xyxy' with an annotation file of COCO.*set xywh"):
        examples(file, box_format="xyxy")
    content = json.loads(file.read_text())
    content["images"][1]["width"] = 40
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"some.json:2: width is 40, and its picture is 48 x 40"):
        examples(file)
    (tmp_path / "some" / content["images"][2]["file_name"]).unlink()
    report = examples(file, skip=True).report
    assert (report.used, report.skipped) == (1, 2) and "No such file" in report.problems[1]


def test_the_labels_are_the_categories_of_the_file(tmp_path: Path) -> None:
    """In the order of their numbers, with those that no picture has; as the checkpoint has them, where it
    knows them all."""
    file = detectors.coco(tmp_path, detectors.rows(3)[1:2], "some")
    model = detectors.detector(tmp_path / "model")
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    r: Any = SimpleNamespace(
        model=SimpleNamespace(path=str(model), revision=None), data=SimpleNamespace(train=source(file))
    )
    assert task(labels=None).settled(r, config).labels == detectors.LABELS
    config["id2label"] = {"0": "cat", "1": "dog"}
    assert task(labels=None).settled(r, config).labels == ORDER
    r.data.train = [r.data.train, source(Path(detectors.write(tmp_path / "rows.jsonl", detectors.rows(3))))]
    found = task(labels=None).settled(r, config).labels
    assert found == tuple(sorted(found)), "of rows beside it only the names that are there"


def test_map_is_what_coco_measures_of_the_file(tmp_path: Path) -> None:
    """Its own evaluation of the file itself, crowds in it, against ours of the rows; and that they count."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    chance = random.Random(3)
    file = detectors.coco(tmp_path, detectors.rows(8, seed=2), "some")
    content = json.loads(file.read_text())
    for one in content["annotations"][::3]:
        one |= {"iscrowd": 1, "area": one["bbox"][2] * one["bbox"][3]}
    file.write_text(json.dumps(content))
    given, said = [], {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        for _ in range(2):
            box = [n + chance.uniform(-2, 2) for n in one["bbox"]]
            row = {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": box}
            given.append({**row, "score": chance.random() + one["iscrowd"]})
            said[one["image_id"]].append(given[-1])
    with contextlib.redirect_stdout(io.StringIO()):
        read: Any = COCO(str(file))
        measured = COCOeval(read, read.loadRes(given), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    names = {number: name for name, number in IDS.items()}

    def boxes(rows: list[dict[str, Any]]) -> Found:
        corners = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in rows)]
        classes = [ORDER.index(names[one["category_id"]]) for one in rows]
        scores = torch.tensor([one["score"] for one in rows])
        return Found(torch.tensor(corners).reshape(-1, 4), torch.tensor(classes, dtype=torch.int64), scores)

    rows = examples(file)
    answers = [boxes(said[image["id"]]) for image in content["images"]]
    ours = average_precision([judged(row) for row in rows], answers, 3)
    assert 0.2 < ours["map"] < 0.95
    assert list(ours.values()) == pytest.approx(measured.stats[:3].tolist(), abs=1e-6)
    wrong = average_precision([right(row) for row in rows], answers, 3)
    assert wrong["map"] < ours["map"] - 0.05, "what is found in crowds would count as wrong"
