"""Which files of a local path are read: the split that was asked for, as the hub would divide them, and
nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from lowbit_ft.data.errors import DataError
from lowbit_ft.data.read import read_rows


def lay(folder: Path, *names: str) -> Path:
    """Files that hold their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([{"text": name}]).to_parquet(str(path))
        elif path.suffix == ".jsonl":
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_text(name)
    return folder


def read(path: Path | str, notes: list[str] | None = None, **keys: Any) -> list[str]:
    source = SimpleNamespace(**{"path": str(path), "split": "train", "name": None, "revision": None, **keys})
    return [row.value["text"] for row in read_rows(source, notes=notes) if row.value]


CLONE = ("README.md", "data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet")
MORE = ("data/more-00000-of-00002.parquet", "data/more-00001-of-00002.parquet")
LAYOUTS = [
    (CLONE, {"train": [CLONE[2]], "test": [CLONE[1]]}),
    (("a.txt", "b.md", "README.md", "LICENSE"), {"train": ["a.txt", "b.md"]}),
    (
        ("train.jsonl", "my-valid.jsonl", "eval_1.jsonl"),
        {"train": ["train.jsonl"], "validation": ["my-valid.jsonl"], "test": ["eval_1.jsonl"]},
    ),
    (
        ("train/x.jsonl", "train/test.jsonl", "dev/y.jsonl"),
        {"train": ["train/test.jsonl", "train/x.jsonl"], "validation": ["dev/y.jsonl"]},
    ),
    (("contest.jsonl", "latest/greatest.jsonl"), {"train": ["contest.jsonl", "latest/greatest.jsonl"]}),
    ((".cache/a.jsonl", "__old__/b.jsonl", "c.jsonl", "dataset_infos.json"), {"train": ["c.jsonl"]}),
    (MORE, {"more": list(MORE)}),
]


@pytest.mark.parametrize("names, splits", LAYOUTS)
def test_a_folder_is_divided_by_names(names, splits, tmp_path):
    folder = lay(tmp_path / "set [1]", *names)
    for split, files in splits.items():
        assert read(folder, split=split) == files, split
    for split in {"train", "validation", "test", "dev", "train[:1]"} - splits.keys():
        with pytest.raises(
            DataError, match=rf"there is no split '{split.replace('[', '.')[:5]}.*{next(iter(splits))}"
        ):
            read(folder, split=split)


@pytest.mark.parametrize("names, splits", [layout for layout in LAYOUTS if "README.md" not in layout[0]])
def test_the_hub_divides_so_too(names, splits, tmp_path, monkeypatch):
    """`datasets` itself on the same folder."""
    if names[0].startswith(".cache"):
        names = names[:3]  # it would take the file for data of another builder
    folder = lay(tmp_path / "set", *names)
    table = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: sorted(table[split]["text"]) for split in table} == splits


def test_files_in_no_split_are_said(tmp_path):
    folder = lay(tmp_path, "train.jsonl", "rest.jsonl")
    notes: list[str] = []
    assert read(folder, notes) == ["train.jsonl"]
    assert notes == [f"{folder}: not read, being in no split by their names: rest.jsonl"]
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(
        DataError, match=r"no split 'train'; the splits here: test \(test.jsonl\); in no split: rest.jsonl"
    ):
        read(folder)


def test_the_configs_of_a_readme_are_honoured(tmp_path):
    folder = lay(tmp_path, "one/a.jsonl", "one/b.jsonl", "two/c.jsonl", "test.jsonl")
    one = "- config_name: one\n  data_files:\n  - split: train\n    path: one/*\n"
    one += "  - split: test\n    path: test.jsonl\n"
    two = "- config_name: two\n  data_files: two/*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{one}{two}---\n# Set\n")
    assert read(folder, name="one") == ["one/a.jsonl", "one/b.jsonl"]
    assert read(folder, name="one", split="test") == ["test.jsonl"]
    assert read(folder, name="two") == ["two/c.jsonl"]
    for name in (None, "three"):
        with pytest.raises(DataError, match=rf"name is {name!r}; README.md declares: one, two"):
            read(folder, name=name)
    (folder / "README.md").write_text(f"---\nconfigs:\n{two}---\n")
    assert read(folder) == ["two/c.jsonl"]
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match="README.md: its YAML header cannot be read"):
        read(folder)


def test_files_and_patterns(tmp_path):
    lay(tmp_path, "train-1.jsonl", "train-2.jsonl", "test.jsonl", "README.md", "x.txt")
    assert read(tmp_path / "test.jsonl") == ["test.jsonl"]  # named by the user: read, whatever its name
    assert read(tmp_path / "README.md") == ["README.md"]
    assert read(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]
    with pytest.raises(
        DataError, match=r"no split 'validation'; the splits here: test \(by the names of the files\)"
    ):
        read(tmp_path / "test.jsonl", split="validation")
    assert read(tmp_path / "train-*.jsonl") == ["train-1.jsonl", "train-2.jsonl"]
    assert read(tmp_path / "*.jsonl") == ["train-1.jsonl", "train-2.jsonl"]
    assert read(tmp_path / "*.jsonl", split="test") == ["test.jsonl"]
    notes: list[str] = []
    assert read(tmp_path / "*", notes) == ["train-1.jsonl", "train-2.jsonl"]
    assert notes == [f"{tmp_path / '*'}: not read, being in no split by their names: x.txt"]
    assert read(tmp_path / "te*.jsonl") == ["test.jsonl"]


@pytest.mark.parametrize("key", ["name", "revision"])
def test_what_a_local_path_does_not_have_is_refused(key, tmp_path):
    lay(tmp_path, "a.jsonl")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path, tmp_path / "a.jsonl", tmp_path / "*.jsonl", tmp_path / "saved"):
        with pytest.raises(DataError, match=f"a local path has no {key}, and the recipe asks for {key}: big"):
            read(path, **{key: "big"})


def test_a_saved_data_set(tmp_path):
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == ["a", "b"]
    with pytest.raises(DataError, match="no split 'test'; the splits here: train"):
        read(tmp_path / "one", split="test")
    splits = datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_list([{"text": "c"}])})
    splits.save_to_disk(str(tmp_path / "all"))
    assert read(tmp_path / "all") == ["a", "b"] and read(tmp_path / "all", split="test") == ["c"]
    with pytest.raises(DataError, match="no split 'validation'; the splits here: train, test"):
        read(tmp_path / "all", split="validation")
    bare = [row.file for row in read_rows(SimpleNamespace(path=str(tmp_path / "all"), limit=1))]
    assert bare == [f"{tmp_path / 'all'}[train]"]
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"not Arrow")
    with pytest.raises(DataError, match="one: not a readable save_to_disk folder"):
        read(tmp_path / "one")
