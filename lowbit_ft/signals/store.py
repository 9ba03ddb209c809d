"""What a teacher says about the windows of a run, kept on the disk: the k likeliest tokens of every position.

    p(v) for the k ids with the largest logits, and r = 1 - sum p(v), the mass of all other tokens together

A folder is one store: safetensors shards of some windows each, and a sealed manifest (files/manifest.py) with
the key (what the numbers were computed from) and the size and hash of every shard that is whole. Shard s is
`windows-0000s.safetensors` with, for its W windows of T positions in all,

    rows  int32 [W]            positions of each window
    ids   uint16 or int32 [T, k]   ascending in every row, so that "no id twice" is one comparison
    log_p  float16 [T, k]       log p, of the ids
    rest  float16 [T]          log r; the smallest float16 where nothing is left

float16 keeps 11 bits: p is off by at most |log p| / 2048 of itself, so the k + 1 masses add up to 1 within
0.6 % (the bound is entropy / 2048, and no vocabulary has an entropy above 13); `lookup` divides it out.

A kill leaves whole shards and a manifest that names them; the next writer goes on with the shard that is
not named. Reading believes nothing: the key and the hash of every shard are compared when a store is
opened, whether the files are still these at every `lookup`, and there of each row shape, order, range,
finiteness and mass. It reads at offsets and maps nothing: a file that another program cuts is an error with
its name, not a bus error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files.atomic import recover_all, visible_names, write_bytes
from ..files.errors import FileError, reading
from ..files.manifest import MANIFEST, file_entry, open_sealed, sealed
from ..files.opened import OpenedFiles
from ..files.tensorfile import DTYPES, TensorEntry, parse_header, read_tensor
from .base import Sparse

FORMAT = "lowbit_ft teacher 1"
LEAST = torch.finfo(torch.float16).min  # of a logarithm; its exponential is 0
OFF = 0.01  # how far the masses of a row may add up from 1; the bound of the file's head is 0.006
_ADVICE = "Remove that file and run the line again: its windows are asked again, the others stay"
_CHANGED = f"by another program since this run compared it with its hash. {_ADVICE}"


def condense(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V] -> ids int64 [T, k] ascending, log_p [T, k], rest [T] in float16: softmax(logits / t)."""
    z = logits.float() / temperature
    ids = z.topk(k, dim=-1, sorted=False).indices.sort(-1).values
    whole = z.logsumexp(-1, keepdim=True)
    log_p = z.gather(-1, ids) - whole
    rest = z.scatter(-1, ids, float("-inf")).logsumexp(-1) - whole[:, 0]
    return ids, _half(log_p), _half(rest)


def _half(logs: Tensor) -> Tensor:
    return logs.clamp(LEAST, 0).to(torch.float16)


def bytes_per_position(k: int, vocabulary: int) -> int:
    """On the disk."""
    return k * (id_dtype(vocabulary).itemsize + 2) + 2


def id_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32


class Store:
    """A folder with what a teacher says about windows `numbers` of a data set (ascending), some per shard.

    key: JSON-able facts, all that the content depends on: it must have top_k and vocabulary. Opening reads
    the manifest and hashes every shard that is there; `missing` tells which are not. ValueError, naming the
    file, for a folder of something else, another key, and a file that is not what was written.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], numbers: Sequence[int], per_shard: int):
        assert per_shard > 0 and list(numbers) == sorted(set(numbers))
        self.folder, self.numbers, self.per_shard = folder, list(numbers), per_shard
        self.key = json.loads(json.dumps({**key, "windows per shard": per_shard}))
        self.k, self.vocabulary = int(key["top_k"]), int(key["vocabulary"])
        assert 0 < self.k <= self.vocabulary
        self.places = {number: place for place, number in enumerate(self.numbers)}
        self.files: dict[str, Any] = self._listed()
        # Before hashing: a file that changes while it is hashed is another one at the first lookup.
        self.opened = OpenedFiles(folder, _CHANGED)
        self._shards: dict[int, _Shard] = {}
        for name in list(self.files):
            if not (folder / name).exists():
                del self.files[name]  # it is asked for again
            elif (folder / name).is_symlink() or file_entry(folder / name) != self.files[name]:
                raise FileError(f"{folder / name}: its content is not the one that was written. {_ADVICE}")

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

    def write(self, shard: int, rows: Sequence[int], ids: Tensor, log_p: Tensor, rest: Tensor) -> None:
        """Put a shard in its place and then into the manifest. rows: positions of each of its windows; the
        tensors as `condense` makes them."""
        path = self.folder / _name(shard)
        assert len(rows) == len(self.windows(shard)) and ids.shape == log_p.shape == (sum(rows), self.k)
        tensors = {
            "rows": torch.tensor(rows, dtype=torch.int32),
            "ids": ids.to(id_dtype(self.vocabulary)).contiguous(),
            "log_p": log_p.contiguous(),
            "rest": rest.contiguous(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        recover_all(self.folder)
        self._refuse_foreign(path)
        if not (self.folder / MANIFEST).exists():  # first: from here on the folder is ours
            self._write_manifest()
        # One entry: the order of several differs from process to process, and with it the hash.
        write_bytes(path, save(tensors, metadata={"lowbit_ft": self.digest}))
        self.files[path.name] = file_entry(path)
        self._write_manifest()

    def lookup(self, numbers: Sequence[int]) -> Sparse:
        """What the teacher says about the positions of these windows, one window after the other; on the CPU.

        FileError when a file changed since it was opened or does not hold what a shard holds; ValueError for
        a window that the store has not.
        """
        self.opened.check()
        parts = []
        for number in numbers:
            place = self.places.get(number)
            if place is None:
                raise ValueError(f"{self.folder}: window {number} is not in it; it has {len(self.numbers):,}")
            shard, within = divmod(place, self.per_shard)
            if shard not in self._shards:
                path = self.folder / _name(shard)
                self._shards[shard] = _Shard(path, len(self.windows(shard)), self.k, self.vocabulary)
            parts.append(self._shards[shard].window(within))
        return Sparse(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _listed(self) -> dict[str, Any]:
        """The shards of the manifest, of a folder that is ours and has our key; none of a new folder."""
        if not (self.folder / MANIFEST).exists():
            if self.folder.exists() and (not self.folder.is_dir() or visible_names(self.folder)):
                raise ValueError(
                    f"{self.folder}: is not empty and holds no teacher's words (no {MANIFEST}), and nothing "
                    "of it is overwritten; choose another folder"
                )
            return {}
        facts = open_sealed(self.folder / MANIFEST)
        if facts.get("format") != FORMAT or not isinstance(facts.get("files"), dict):
            raise ValueError(
                f"{self.folder / MANIFEST}: is of {facts.get('format')!r}, not of {FORMAT!r}; choose another "
                "folder"
            )
        if facts.get("key") != self.key:
            raise OtherKey(self.folder, facts.get("key"), self.key)
        known = {_name(shard) for shard in range(self.shards)}
        return {name: entry for name, entry in facts["files"].items() if name in known}

    def _write_manifest(self) -> None:
        facts = {"format": FORMAT, "key": self.key, "files": dict(sorted(self.files.items()))}
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

    def __init__(self, folder: Path, there: Any, here: Mapping[str, Any]):
        there = there if isinstance(there, dict) else {}
        differ = [
            f"{name} {_short(there.get(name))}, and this run has {_short(here.get(name))}"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        super().__init__(
            f"{folder}: holds what a teacher says about something else: {'; '.join(differ)}. Give this run "
            "another train.teacher_dir (null: its own folder), or remove that folder"
        )


class _Shard:
    """One shard, read window by window. Its hash has been compared; its content is looked at here."""

    def __init__(self, path: Path, windows: int, k: int, vocabulary: int):
        self.path, self.k, self.vocabulary = path, k, vocabulary
        start, header = parse_header(path)
        found = {
            name: TensorEntry(
                path,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        total = found["ids"].shape[0] if "ids" in found and found["ids"].shape else 0
        wanted = {
            "rows": (torch.int32, (windows,)),
            "ids": (id_dtype(vocabulary), (total, k)),
            "log_p": (torch.float16, (total, k)),
            "rest": (torch.float16, (total,)),
        }
        if {name: (entry.dtype, entry.shape) for name, entry in found.items()} != wanted:
            raise self._wrong(f"it should hold {', '.join(wanted)} of {windows} windows and {k} tokens")
        rows = read_tensor(found["rows"]).long()
        if bool((rows < 0).any()) or int(rows.sum()) != total:
            raise self._wrong("the positions of its windows do not add up")
        self.entries, self.ends = found, [0, *rows.cumsum(0).tolist()]

    def window(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64, log p and the log of the rest's mass float32, of the positions of a window."""
        first, last = self.ends[index], self.ends[index + 1]
        ids, log_p, rest = (self._rows(name, first, last) for name in ("ids", "log_p", "rest"))
        ids, log_p, rest = ids.long(), log_p.float(), rest.float()
        if not (bool(log_p.isfinite().all()) and bool(rest.isfinite().all())):
            raise self._wrong("a log-probability is NaN or infinite")
        if (
            bool((ids < 0).any())
            or bool((ids >= self.vocabulary).any())
            or bool((ids.diff(dim=-1) <= 0).any())
        ):
            raise self._wrong(f"ids that are not ascending, or beyond the vocabulary of {self.vocabulary}")
        mass = torch.cat([log_p, rest[:, None]], -1).logsumexp(-1)  # the log of it
        if bool((log_p > 0).any()) or bool((rest > 0).any()) or bool((mass.abs() > OFF).any()):
            raise self._wrong("probabilities that do not add up to 1")
        return ids, log_p - mass[:, None], rest - mass

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        entry = self.entries[name]
        size = entry.dtype.itemsize * (self.k if len(entry.shape) == 2 else 1)
        shape = (last - first, *entry.shape[1:])
        return read_tensor(
            entry._replace(shape=shape, start=entry.start + first * size, nbytes=(last - first) * size)
        )

    def _wrong(self, what: str) -> FileError:
        return FileError(f"{self.path}: no shard of a teacher's words: {what}. {_ADVICE}")


def _name(shard: int) -> str:
    return f"windows-{shard:05}.safetensors"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
