"""Manifests: what was written into a folder, what it must hash to, and the manifest's own hash.

`sealed` makes the bytes of a manifest, `open_sealed` takes no others: a manifest is read back only when it
is, byte for byte, what its content seals to. So any changed bit is found, a space as well as a digit.

Hashing reads each file once: within a process a digest is kept for as long as device, inode, size and times
of the file stay the same. A file changed less than GRAIN seconds ago is hashed anew each time, because a
clock tick later it could have other bytes under the same times.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .jsonfile import parse_json, read_bytes
from .regular import open_regular

MANIFEST = "lowbit_ft.json"  # of a folder of ours: a model, an adapter
SEAL = "manifest_sha256"
GRAIN = 2.0  # seconds; FAT's clock ticks as slowly, ext4 and NFS in milliseconds

_Key = tuple[int, int, int, int, int]
_digests: dict[_Key, str] = {}


def sealed(facts: Mapping[str, Any]) -> bytes:
    """A manifest as JSON, with the sha256 of its other content as its last entry."""
    open_facts = {key: value for key, value in facts.items() if key != SEAL}
    digest = hashlib.sha256(json_bytes(open_facts)).hexdigest()
    return json_bytes({**open_facts, SEAL: digest})


_AWAY = "move the folder away and run the line again"


def open_sealed(path: Path) -> dict[str, Any]:
    """The content of a manifest, without its seal. ValueError when it is missing or not what was written."""
    data = read_bytes(path, "not a folder that lowbit_ft wrote")
    try:
        facts = parse_json(data, str(path), dict[str, Any])
    except ValueError as error:
        raise ValueError(f"{error}; {_AWAY}") from error
    try:
        whole = sealed(facts) == data
    except ValueError:  # text that is no UTF-8 when it is written again
        whole = False
    if not whole:
        found = "its own hash does not agree with it" if SEAL in facts else "it has no hash of its own"
        raise ValueError(f"{path}: damaged: {found}; {_AWAY}")
    del facts[SEAL]
    return facts


def json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def file_entry(path: Path) -> dict[str, Any]:
    """What manifests say of a file: {"bytes": its size, "sha256": hex digest}."""
    with open_regular(path) as file:
        began, before = time.time(), os.fstat(file.fileno())
        digest = _digests.get(_key(before))
        if digest is None:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
            if _key(after) == _key(before) and began - before.st_mtime > GRAIN:
                _digests[_key(before)] = digest
    return {"bytes": before.st_size, "sha256": digest}


def changed_files(folder: Path, entries: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files of a manifest, one sentence each: missing, or with another content. An
    empty entry matches any content.
    """
    problems = []
    for name, entry in entries.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            problems.append(f"{name}: missing")
        elif entry and (found := file_entry(path)) != entry:
            problems.append(
                f"{name}: its content is not the one that was written (now {found['bytes']} bytes, sha256 "
                f"{found['sha256'][:12]}...; written as {entry.get('bytes')} bytes, "
                f"{str(entry.get('sha256'))[:12]}...)"
            )
    return problems


def identity(folder: Path) -> str:
    """One hash for the tensors of a folder with a manifest: which weights these are, whatever its other files
    say.
    """
    files = open_sealed(folder / MANIFEST).get("files", {})
    tensors = {
        name: entry for name, entry in files.items() if name.endswith((".safetensors", ".gguf", ".onnx_data"))
    }
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def _key(stat: os.stat_result) -> _Key:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
