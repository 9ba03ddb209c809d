"""Folders of pictures: what lies beside them, as the imagefolder of `datasets` reads it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lowbit_ft.data.errors import DataError
from lowbit_ft.data.read import read_rows
from lowbit_ft.tasks import TASKS


def source(path: Path, split: str = "train", **keys: Any) -> Any:
    given = {"path": str(path), "split": split, "name": None, "revision": None, "limit": None}
    return SimpleNamespace(**given | keys)


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(file)


def test_a_stray_text_is_passed_over_and_said(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/2.png"):
        picture(tmp_path / name)
    for name in ("labels.txt", "LICENSE.md"):
        (tmp_path / name).write_text("cat\ndog\n")
    notes: list[str] = []
    rows = list(read_rows(source(tmp_path), notes=notes))
    assert [(row.value or {})["label"] for row in rows] == ["cat", "dog"]
    assert notes == [f"{tmp_path}: not read, being text in a folder of pictures: LICENSE.md, labels.txt"]
    texts = list(read_rows(source(tmp_path, format="text"), notes=notes))  # documents with a picture
    assert [row.value for row in texts] == [{"text": "cat\ndog\n"}] * 2
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "cat/1.png", "label": "cat"}))
    (only,) = read_rows(source(tmp_path), notes=notes)
    assert only.value == {"image": "cat/1.png", "label": "cat"}, "rows that name pictures stay rows"


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_has_the_rows_as_in_datasets(suffix: str, tmp_path: Path) -> None:
    """Split by split; the label of a folder counts no more."""
    import datasets

    for split, names in (("train", ("1.png", "deep/2.png")), ("test", ("3.png",))):
        for name in names:
            picture(tmp_path / split / name)
        file = tmp_path / split / f"metadata.{suffix}"
        rows = [{"file_name": name, "label": f"kind {name}"} for name in names]
        if suffix == "csv":
            with file.open("w", newline="") as text:
                writer = csv.DictWriter(text, ["file_name", "label"])
                writer.writeheader()
                writer.writerows(rows)
        elif suffix == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            datasets.Dataset.from_list(rows).to_parquet(str(file))
    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path.parent / "c"))
    for split in ("train", "test"):
        theirs: Any = table[split].cast_column("image", datasets.Image(decode=False))
        ours = list(read_rows(source(tmp_path, split)))
        found = {(str(row.beside / row.value["image"]), row.value["label"]) for row in ours if row.value}
        assert found == {(one["image"]["path"], one["label"]) for one in theirs}
        assert all(set(row.value or ()) == {"image", "label"} for row in ours)
    task: Any = TASKS["image_classification"].model_validate(
        {"kind": "image_classification", "labels": ["kind 1.png", "kind deep/2.png"]}
    )
    made = task.examples(source(tmp_path), SimpleNamespace(sequence_len=8, on_bad_row="error"), None)
    assert sorted(row["labels"] for row in made) == [0, 1]
    (tmp_path / "train" / "deep" / "2.png").unlink()
    with pytest.raises(DataError, match=rf"metadata.{suffix}:\d: 'image': deep/2.png cannot be read"):
        task.examples(source(tmp_path), SimpleNamespace(sequence_len=8, on_bad_row="error"), None)


def test_one_metadata_above_several_splits_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.png,cat\n")
    (row,) = read_rows(source(tmp_path))
    assert row.value == {"image": "train/1.png", "label": "cat"}
    picture(tmp_path / "test" / "2.png")
    with pytest.raises(
        DataError, match=r"metadata.csv has the rows of .*several splits \(train, test\); write"
    ):
        list(read_rows(source(tmp_path)))
