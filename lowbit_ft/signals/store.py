"""What a teacher says about the windows of a run, kept on the disk: the k likeliest tokens of every position.

    p(v) for the k ids with the largest logits, and r = 1 - sum p(v), the mass of all other tokens together

A folder is one store of shards (shards.py). A shard has, for its W windows of T positions in all,

    rows  int32 [W]            positions of each window
    ids   uint16 or int32 [T, k]   ascending in every row, so that "no id twice" is one comparison
    log_p  float16 [T, k]       log p, of the ids
    rest  float16 [T]          log r; the smallest float16 where nothing is left

float16 keeps 11 bits: p is off by at most |log p| / 2048 of itself, so the k + 1 masses add up to 1 within
0.6 % (the bound is entropy / 2048, and no vocabulary has an entropy above 13); `lookup` divides it out.

Reading believes nothing: beside what shards.py compares, of each row shape, order, range, finiteness and
mass. It reads at offsets and maps nothing: a file that another program cuts is an error with its name, not a
bus error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.errors import FileError
from ..files.tensorfile import DTYPES, TensorEntry, parse_header, read_tensor
from .base import Sparse
from .shards import ADVICE, Shards

LEAST = torch.finfo(torch.float16).min  # of a logarithm; its exponential is 0
OFF = 0.01  # how far the masses of a row may add up from 1; the bound of the file's head is 0.006


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


class Store(Shards):
    """What a teacher says about windows `numbers` of a data set. key: it must have top_k and vocabulary."""

    FORMAT = "lowbit_ft teacher 1"
    KEEPS = "teacher's words"

    def __init__(self, folder: Path, key: Mapping[str, Any], numbers: Sequence[int], per_shard: int):
        self.k, self.vocabulary = int(key["top_k"]), int(key["vocabulary"])
        assert 0 < self.k <= self.vocabulary
        super().__init__(folder, key, numbers, per_shard)
        self._shards: dict[int, _Shard] = {}

    def write(self, shard: int, rows: Sequence[int], ids: Tensor, log_p: Tensor, rest: Tensor) -> None:
        """Put a shard in its place and then into the manifest. rows: positions of each of its windows; the
        tensors as `condense` makes them."""
        assert len(rows) == len(self.windows(shard)) and ids.shape == log_p.shape == (sum(rows), self.k)
        tensors = {
            "rows": torch.tensor(rows, dtype=torch.int32),
            "ids": ids.to(id_dtype(self.vocabulary)).contiguous(),
            "log_p": log_p.contiguous(),
            "rest": rest.contiguous(),
        }
        self.put(shard, tensors)

    def lookup(self, numbers: Sequence[int]) -> Sparse:
        """What the teacher says about the positions of these windows, one window after the other; on the CPU.

        FileError when a file changed since it was opened or does not hold what a shard holds; ValueError for
        a window that the store has not.
        """
        self.opened.check()
        parts = []
        for number in numbers:
            shard, within = self.place(number)
            if shard not in self._shards:
                windows = len(self.windows(shard))
                self._shards[shard] = _Shard(self.path(shard), windows, self.k, self.vocabulary)
            parts.append(self._shards[shard].window(within))
        return Sparse(*(torch.cat(column) for column in zip(*parts, strict=True)))


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
        return FileError(f"{self.path}: no shard of a teacher's words: {what}. {ADVICE}")
