"""Where a checkpoint comes from: a folder, a hub snapshot, a hub id; its links, its names, its headers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_ft.files.tensorfile import CheckpointError, read_header
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.hub import contained_file, locate
from lowbit_ft.model.load import load_model
from tests.checkpoint_tools import MODELS, TINY, random_checkpoint


def test_hub_snapshot_links_work_and_others_do_not(llama: Path, tmp_path: Path) -> None:
    """The layout of the hub cache: snapshots/<commit>/x.safetensors -> ../../blobs/<hash>."""
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    shutil.move(llama / "model.safetensors", repo / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/abc"))
    shutil.copy(llama / "config.json", snapshot)
    load_model(Checkpoint.open(snapshot))
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(repo / "blobs" / "abc", other / "def")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "def")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        Checkpoint.open(snapshot)


def test_hub_id_downloads_only_what_the_index_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "1" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    random_checkpoint(snapshot, MODELS["llama"](), shard="20KB")
    asked: list[tuple[str | None, list[str]]] = []

    def fake(
        repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert repo == "owner/name" and ignore_patterns == ["*/*"]
        asked.append((revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    checkpoint = Checkpoint.open("owner/name", revision="main")
    assert checkpoint.revision == commit and checkpoint.source == "owner/name"
    assert [revision for revision, _ in asked] == ["main", commit]
    assert not any("safetensors" in pattern for pattern in asked[0][1])
    assert {p for p in asked[1][1] if p.endswith(".safetensors")} == {
        p.name for p in snapshot.glob("*.safetensors")
    }


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("no/such/folder", None, "no such folder"),
        ("./missing", None, "no such folder"),
        (str(TINY), "main", "a local folder has no revision"),
        (str(TINY / "config.json"), None, "a file; give the folder"),
    ],
)
def test_source_that_is_not_there(source: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(source, revision)


def test_hub_failure_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("offline\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^owner/name: no such folder.*OSError: offline\)$"):
        locate("owner/name", None)


@given(name=st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_fuzz_shard_names_never_leave_the_folder(name: str) -> None:
    try:
        path = contained_file(TINY, name + ".safetensors")
    except CheckpointError:
        return
    assert path.resolve().parent == TINY.resolve()


@given(data=st.binary(max_size=200), json_like=st.booleans())
@settings(max_examples=200, deadline=None)
def test_fuzz_header_is_read_or_refused(data: bytes, json_like: bool, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data if json_like else data)
    try:
        assert isinstance(read_header(path), dict)
    except CheckpointError as error:
        assert str(path) in str(error)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ENTRY | {"dtype": "F4"}, "dtype 'F4'"),
        (ENTRY | {"shape": [-2]}, "integers >= 0"),
        (ENTRY | {"shape": [3]}, "cannot lie in bytes 0:8"),
        (ENTRY | {"data_offsets": [4, 12]}, "cannot lie in bytes 4:12"),
        (ENTRY | {"data_offsets": [0]}, "damaged header entry"),
        ({"dtype": "F32"}, "damaged header entry"),
        ("x", "damaged header entry"),
    ],
)
def test_damaged_header(entry: Any, message: str, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_header(path)
    good = json.dumps({"w": ENTRY, "__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(good).to_bytes(8, "little") + good + bytes(8))
    assert read_header(path) == {"w": ENTRY}
