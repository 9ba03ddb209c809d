"""Manifests: every bit counts; a digest is kept only while the file is certainly the same."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from lowbit_ft.files import manifest
from lowbit_ft.files.errors import FileError, reading, writing
from lowbit_ft.files.manifest import MANIFEST, SEAL, changed_files, file_entry, identity, open_sealed, sealed
from lowbit_ft.files.marker import MARKER, is_run
from lowbit_ft.files.tensorfile import CheckpointError, load_tensors, read_header

FACTS = {"writer": "lowbit_ft", "files": {"ü.bin": {"bytes": 3, "sha256": "ab" * 32}}, "layers": {}}


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path, whole = tmp_path / MANIFEST, sealed(FACTS)
    path.write_bytes(whole)
    assert open_sealed(path) == FACTS
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=MANIFEST):
                open_sealed(path)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=MANIFEST):
            open_sealed(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")).filter(lambda k: k != SEAL), json_values))
def test_what_is_sealed_comes_back(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "sealed.json"
    path.write_bytes(sealed(facts))
    assert open_sealed(path) == facts
    assert sealed(sealed_again := json.loads(path.read_bytes())) == path.read_bytes() and SEAL in sealed_again


def test_what_is_said_of_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    with pytest.raises(ValueError, match="missing; not a folder that lowbit_ft wrote"):
        open_sealed(path)
    path.write_text(json.dumps(FACTS))
    with pytest.raises(ValueError, match="damaged: it has no hash of its own; move the"):
        open_sealed(path)
    path.write_bytes(sealed(FACTS).replace(b'"bytes": 3', b'"bytes": 4'))
    with pytest.raises(ValueError, match="damaged: its own hash does not agree"):
        open_sealed(path)
    for text in ("[]", "3", "null", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=MANIFEST):
            open_sealed(path)


def test_a_digest_is_read_once_while_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "a", []
    real = hashlib.file_digest
    monkeypatch.setattr(manifest.hashlib, "file_digest", lambda *a: reads.append(1) or real(*a))

    def write(text: str, age: float) -> None:
        path.write_text(text)
        os.utime(path, (time.time(), time.time() - age))

    def found() -> str:
        return file_entry(path)["sha256"]

    write("one", 100)
    assert found() == found() == hashlib.sha256(b"one").hexdigest() and len(reads) == 1
    path.rename(tmp_path / "b")  # the name does not matter, the file does
    (tmp_path / "b").rename(path)
    old = os.stat(path)
    write("two", 0)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # the same size, and its date set back
    assert found() == hashlib.sha256(b"two").hexdigest()
    write("six", 0)  # of just now: the clock may not have ticked since
    before = len(reads)
    assert found() == found() == hashlib.sha256(b"six").hexdigest() and len(reads) == before + 2


def test_changed_files_say_what_is_there_and_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    entries = {"a": file_entry(tmp_path / "a"), "b": {"bytes": 1, "sha256": "0"}, "../a": {}, "c": {}}
    (tmp_path / "a").write_text("two!")
    (tmp_path / "c").write_text("anything")
    problems = changed_files(tmp_path, entries)
    assert len(problems) == 3 and problems[1:] == ["b: missing", "../a: missing"]
    assert problems[0].startswith("a: its content is not the one that was written (now 4 bytes, sha256 ")
    assert "written as 3 bytes, 7692c3ad3540..." in problems[0]


def test_identity_is_of_the_tensors(tmp_path: Path) -> None:
    def of(**files: str) -> str:
        entries = {name.replace("__", "."): {"bytes": 1, "sha256": sha} for name, sha in files.items()}
        (tmp_path / MANIFEST).write_bytes(sealed({"files": entries}))
        return identity(tmp_path)

    one = of(model__safetensors="1", README__md="2")
    assert of(model__safetensors="1", README__md="3") == one
    assert len({one, of(model__safetensors="4"), of(x__gguf="1"), of()}) == 4


def test_errors_of_libraries_become_ours(tmp_path: Path) -> None:
    full = "No space left on device"
    for error in (SafetensorError(f"I/O error: {full}"), OSError(errno.ENOSPC, full)):
        with pytest.raises(FileError, match=r"x/y: could not be written \(.*No space left"), writing("x/y"):
            raise error
        with pytest.raises(FileError, match=r"x/y: cannot be read \(.*No space left"), reading("x/y"):
            raise error
    with pytest.raises(KeyError), writing("x/y"):
        raise KeyError


def test_a_header_with_a_name_twice_is_an_error_of_ours(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    path = tmp_path / "twice.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    for read in (read_header, load_tensors):
        with pytest.raises(CheckpointError, match=r"twice\.safetensors: damaged header: 'a' is there twice"):
            read(path)


def test_a_manifest_or_mark_of_a_stranger_is_not_waited_for(tmp_path: Path) -> None:
    """Pipes, devices, JSON without an end: one message that names the file, and no run is seen."""
    for name in (MANIFEST, MARKER):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=r"lowbit_ft\.json: got a pipe"):
        open_sealed(tmp_path / MANIFEST)
    assert not is_run(tmp_path)
    for name in (MANIFEST, MARKER):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"lowbit_ft\.json: not readable JSON \(nested deeper"):
        open_sealed(tmp_path / MANIFEST)
    assert not is_run(tmp_path)
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="zero: got a device"):
        file_entry(tmp_path / "zero")
