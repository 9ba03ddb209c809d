"""A folder of shards about the windows of a run: hashed, gone on with after a kill, refused where it is
another's.

A store is safetensors shards of some windows each, `windows-0000s.safetensors`, and a sealed manifest
(files/manifest.py) with the key (what the numbers were computed from) and the size and hash of every shard
that is whole. A kill leaves whole shards and a manifest that names them; the next writer goes on with the
shard that is not named. Reading believes nothing: the key and the hash of every shard are compared when a
store is opened, and whether the files are still these at every lookup. What is in a shard says the kind of
the store: a teacher's likeliest tokens (store.py), log-probabilities of sequences (sequences.py)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files.atomic import recover_all, visible_names, write_bytes
from ..files.errors import FileError, reading
from ..files.manifest import MANIFEST, file_entry, open_sealed, sealed
from ..files.opened import OpenedFiles

ADVICE = "Remove that file and run the line again: its windows are asked again, the others stay"
CHANGED = f"by another program since this run compared it with its hash. {ADVICE}"


class Shards:
    """A folder with something about windows `numbers` of a data set (ascending), some per shard.

    key: JSON-able facts, all that the content depends on. Opening reads the manifest and hashes every shard
    that is there; `missing` tells which are not. ValueError, naming the file, for a folder of something else,
    another key, and a file that is not what was written. FORMAT: of the manifest; KEEPS: what is kept, for
    messages.
    """

    FORMAT: ClassVar[str]
    KEEPS: ClassVar[str]

    def __init__(self, folder: Path, key: Mapping[str, Any], numbers: Sequence[int], per_shard: int):
        assert per_shard > 0 and list(numbers) == sorted(set(numbers))
        self.folder, self.numbers, self.per_shard = folder, list(numbers), per_shard
        self.key = json.loads(json.dumps({**key, "windows per shard": per_shard}))
        self.places = {number: place for place, number in enumerate(self.numbers)}
        self.files: dict[str, Any] = self._listed()
        # Before hashing: a file that changes while it is hashed is another one at the first lookup.
        self.opened = OpenedFiles(folder, CHANGED)
        for name in list(self.files):
            if not (folder / name).exists():
                del self.files[name]  # it is asked for again
            elif (folder / name).is_symlink() or file_entry(folder / name) != self.files[name]:
                raise FileError(f"{folder / name}: its content is not the one that was written. {ADVICE}")

    @property
    def digest(self) -> str:
        """One hash for the key: which answers these are, wherever they lie."""
        return _digest(self.key)

    @property
    def shards(self) -> int:
        return -(-len(self.numbers) // self.per_shard)

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.shards) if _name(shard) not in self.files]

    def windows(self, shard: int) -> list[int]:
        """The numbers of the windows of a shard."""
        return self.numbers[shard * self.per_shard : (shard + 1) * self.per_shard]

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / _name(shard)

    def put(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Put a shard in its place and then into the manifest."""
        path = self.path(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        recover_all(self.folder)
        self._refuse_foreign(path)
        if not (self.folder / MANIFEST).exists():  # first: from here on the folder is ours
            self._write_manifest()
        # One entry: the order of several differs from process to process, and with it the hash.
        write_bytes(path, save(tensors, metadata={"lowbit_ft": self.digest}))
        self.files[path.name] = file_entry(path)
        self._write_manifest()

    def place(self, number: int) -> tuple[int, int]:
        """The shard of a window, and its place there. ValueError for one that is not kept."""
        place = self.places.get(number)
        if place is None:
            raise ValueError(f"{self.folder}: window {number} is not in it; it has {len(self.numbers):,}")
        return divmod(place, self.per_shard)

    def _listed(self) -> dict[str, Any]:
        """The shards of the manifest, of a folder that is ours and has our key; none of a new folder."""
        if not (self.folder / MANIFEST).exists():
            if self.folder.exists() and (not self.folder.is_dir() or visible_names(self.folder)):
                raise ValueError(
                    f"{self.folder}: is not empty and holds no {self.KEEPS} (no {MANIFEST}), and nothing "
                    "of it is overwritten; choose another folder"
                )
            return {}
        facts = open_sealed(self.folder / MANIFEST)
        if facts.get("format") != self.FORMAT or not isinstance(facts.get("files"), dict):
            raise ValueError(
                f"{self.folder / MANIFEST}: is of {facts.get('format')!r}, not of {self.FORMAT!r}; choose "
                "another folder"
            )
        if facts.get("key") != self.key:
            raise OtherKey(self.folder, self.KEEPS, facts.get("key"), self.key)
        known = {_name(shard) for shard in range(self.shards)}
        return {name: entry for name, entry in facts["files"].items() if name in known}

    def _write_manifest(self) -> None:
        facts = {"format": self.FORMAT, "key": self.key, "files": dict(sorted(self.files.items()))}
        write_bytes(self.folder / MANIFEST, sealed(facts))

    def _refuse_foreign(self, path: Path) -> None:
        """A kill between a shard and its line in the manifest leaves a file of ours; another one is not
        replaced."""
        if not os.path.lexists(path):
            return
        try:
            with reading(path), safe_open(path, "pt") as file:
                ours = (file.metadata() or {}).get("lowbit_ft") == self.digest
        except FileError:
            ours = False
        if not ours or path.is_symlink():
            raise FileError(f"{path}: was not written for this store, and is not overwritten; move it away")


class OtherKey(ValueError):
    """A store of another teacher, other windows or other settings; the message says which."""

    def __init__(self, folder: Path, keeps: str, there: Any, here: Mapping[str, Any]):
        there = there if isinstance(there, dict) else {}
        differ = [
            f"{name} {_short(there.get(name))}, and this run has {_short(here.get(name))}"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        super().__init__(
            f"{folder}: holds {keeps} about something else: {'; '.join(differ)}. Give this run "
            "another train.teacher_dir (null: its own folder), or remove that folder"
        )


def _name(shard: int) -> str:
    return f"windows-{shard:05}.safetensors"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
