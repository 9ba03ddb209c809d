"""COCO's annotation files as rows: what pycocotools reads in them, entry by entry, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_ft.data import coco
from lowbit_ft.data.errors import DataError
from lowbit_ft.data.read import categories, read_rows


def source(path: Path, **keys: Any) -> Any:
    given = {"path": str(path), "split": "train", "name": None, "revision": None, "limit": None}
    return SimpleNamespace(**given | keys)


def small() -> dict[str, Any]:
    """Two images, of which the second has nothing; categories 3 and 90; a crowd."""
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 9, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 4, "file_name": "b.png"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 90, "bbox": [1, 2, 3.5, 4], "segmentation": [[1, 2] * 9]},
            {"id": 7, "image_id": 9, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car", "supercategory": "x"}],
    }


def write(folder: Path, found: Any, name: str = "instances_some.json", **options: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps(found, **options))
    return file


def test_two_tables_become_rows(tmp_path: Path) -> None:
    every: tuple[dict[str, Any], ...] = ({}, {"indent": 2}, {"separators": (",", ":")})
    for options in every:
        file = write(tmp_path, small(), **options)
        first, second = read_rows(source(file))
        assert first.value == {
            "image": "a.png",
            "width": 40,
            "height": 30,
            "objects": {
                "bbox": [[1, 2, 3.5, 4], [0, 0, 9, 9]],
                "category": ["toothbrush", "car"],
                "iscrowd": [0, 1],
            },
        }
        assert second.value == {"image": "b.png", "objects": {"bbox": [], "category": [], "iscrowd": []}}
        assert (first.number, second.number) == (1, 2)
        assert categories(source(file)) == ["car", "toothbrush"], "by their ids"
    assert [row.number for row in read_rows(source(file, limit=1))] == [1]


@pytest.mark.parametrize(
    "place", ["annotations", "some", "../some", "../images/some", "images", "../images", "images/some"]
)
def test_pictures_are_found_where_coco_is_unpacked(place: str, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    file = write(tmp_path / "annotations", small())
    folder = (tmp_path if place == "annotations" else file.parent) / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "b.png").write_bytes(b"")
    first, second = read_rows(source(file))
    assert second.beside.resolve() == (first.beside if place == "annotations" else folder).resolve()
    elsewhere = list(read_rows(source(file, media_dir=str(tmp_path / "other"))))
    assert [row.beside for row in elsewhere] == [tmp_path / "other"] * 2


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    ids = st.integers(0, 10**6)
    images = draw(st.lists(ids, unique=True, min_size=1, max_size=6))
    kinds = draw(st.lists(ids, unique=True, min_size=1, max_size=4))
    number = st.floats(0.01, 500, allow_nan=False) | st.integers(1, 500)
    entry = st.fixed_dictionaries(
        {
            "image_id": st.sampled_from(images),
            "category_id": st.sampled_from(kinds),
            "bbox": st.lists(number, min_size=4, max_size=4),
            "iscrowd": st.sampled_from([0, 1]),
            "caption": st.text(max_size=9),
        }
    )
    entries, count = draw(st.lists(entry, max_size=12)), st.integers(1, 10**6)
    numbers = draw(st.lists(count, unique=True, min_size=len(entries), max_size=len(entries)))
    found = {
        "images": [{"id": one, "file_name": f"{one}.png"} for one in images],
        "annotations": [{"id": n, **one} for n, one in zip(numbers, entries, strict=True)],
        "categories": [{"id": one, "name": f"kind {one}"} for one in kinds],
        "info": draw(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2)),
    }
    return {key: found[key] for key in draw(st.permutations(list(found)))}


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(1, 40), st.booleans())
def test_rows_are_what_pycocotools_reads(found: dict[str, Any], block: int, ascii_only: bool) -> None:
    """Whatever the order of the tables, and wherever a buffer ends."""
    tools: Any = pytest.importorskip("pycocotools.coco")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = write(Path(folder), found, ensure_ascii=ascii_only)
        patch.setattr(coco, "BLOCK", block)
        rows, names = list(read_rows(source(file))), categories(source(file))
        with contextlib.redirect_stdout(io.StringIO()):
            read = tools.COCO(str(file))
    assert names == [read.cats[i]["name"] for i in sorted(read.getCatIds())]
    assert [row.value["image"] for row in rows if row.value] == [read.imgs[i]["file_name"] for i in read.imgs]
    for row, image in zip(rows, read.imgs, strict=True):
        theirs = read.loadAnns(read.getAnnIds(imgIds=[image]))
        assert row.value is not None
        assert row.value["objects"] == {
            "bbox": [one["bbox"] for one in theirs],
            "category": [read.cats[one["category_id"]]["name"] for one in theirs],
            "iscrowd": [one["iscrowd"] for one in theirs],
        }


def without(table: str, at: int, key: str) -> Any:
    def change(found: dict[str, Any]) -> None:
        del found[table][at][key]

    return change


def given_to(table: str, at: int, **values: Any) -> Any:
    return lambda found: found[table][at].update(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (given_to("images", 1, id=9), r"images\[1\] \(id 9\): another image has this id"),
        (given_to("annotations", 1, id=1), r"annotations\[1\] \(id 1\): another annotation has this id"),
        (given_to("categories", 1, id=90), r"categories\[1\] \(id 90\): another category has this id"),
        (given_to("categories", 1, name="toothbrush"), "categories 90 and 3 are both called 'toothbrush'"),
        (given_to("annotations", 1, image_id=5), r"annotations\[1\] \(id 7\): image_id 5 is the id of no"),
        (given_to("annotations", 0, image_id=None), r"\(id 1\): 'image_id' must be a number .*; got null"),
        (without("annotations", 0, "id"), r"annotations\[0\]: 'id' must be a number .*got null"),
        (without("images", 0, "file_name"), r"images\[0\] \(id 9\): 'file_name' must be the name"),
        (given_to("images", 0, width=-3), "width and height are pixels, 1 or more; got -3"),
        (lambda found: found.update(categories=[]), "categories is empty"),
        (lambda found: found["images"].append("c.png"), r"images\[2\]: an entry is an object; got a string"),
    ],
)
def test_a_file_whose_tables_do_not_fit_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    found = small()
    change(found)
    file = write(tmp_path, found)
    if not found["categories"]:
        found["annotations"] = []
        file = write(tmp_path, found)
    with pytest.raises(DataError, match=rf"instances_some.json: .*{said}"):
        list(read_rows(source(file)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [1, 2, -3, 4]}, r"a.png: annotation 1: its box \[1, 2, -3, 4\] has no size"),
        ({"bbox": [1, 2, 3]}, "annotation 1: 'bbox' must be four finite numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, "must be four finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "must be four finite numbers"),
        ({"bbox": None}, "four finite numbers .*; got null"),
        ({"category_id": 5}, "a.png: annotation 1: category_id 5 is the id of no entry of categories"),
        ({"iscrowd": 2}, "'iscrowd' must be 0 or 1; got 2"),
    ],
)
def test_what_is_wrong_with_one_picture_is_its_own(change: Any, said: str, tmp_path: Path) -> None:
    found = small()
    found["annotations"][0] |= change
    first, second = read_rows(source(write(tmp_path, found)))
    assert first.value is None and second.value is not None
    with pytest.raises(DataError, match=said):
        raise DataError(first.problem or "")


def test_json_that_is_none_of_it_is_read_as_before(tmp_path: Path) -> None:
    """Rows that speak of the words, an object whose tables are no lists, lines of such."""
    row = {"text": '"images" "annotations" "categories"', "images": [1]}
    assert [r.value for r in read_rows(source(write(tmp_path, [row])))] == [row]
    other = {"images": 3, "annotations": [], "categories": []}
    file = write(tmp_path, other)
    assert categories(source(file)) is None and [r.value for r in read_rows(source(file))] == [other]
    file.write_text(f"{json.dumps(other)}\n{json.dumps(other)}\n")
    assert [r.value for r in read_rows(source(file))] == [other, other]
    for cut in (250, -3):
        file.write_text(json.dumps(small() | {"about": '"categories"'})[:cut])
        with pytest.raises(DataError, match=r"instances_some.json.*invalid JSON"):
            list(read_rows(source(file)))
    file.write_text(json.dumps(small()).replace('"image_id": 9,', '"image_id" 9,', 1))
    with pytest.raises(DataError, match=r"invalid JSON in annotations\[0\]: "):
        list(read_rows(source(file)))


def test_polygons_are_not_kept(tmp_path: Path) -> None:
    """A file of 4 MB, nearly all of it polygons, takes the buffer and what is left of its boxes."""
    polygon = [round(i * 1.37, 2) for i in range(300)]
    found = small() | {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(200)]}
    found["annotations"] = [
        {"segmentation": [polygon], "bbox": [1, 2, 3, 4], "id": i, "image_id": i % 200, "category_id": 3}
        for i in range(2000)
    ]
    file = write(tmp_path, found)
    assert file.stat().st_size > 4e6
    del found
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "BLOCK", 1 << 16)
        rows = read_rows(source(file))
        assert len((next(rows).value or {})["objects"]["bbox"]) == 10
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6, f"{peak:,} bytes"
