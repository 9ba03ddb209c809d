"""log p of whole answers, kept on the disk: what the reference of a preference loss says about the windows
of a run.

A store of shards (shards.py); a shard has, for its W windows of S answers in all,

    rows   int32 [W]      answers of each window, chosen and rejected in turn
    log_p  float64 [S]    the sum over an answer's tokens of their log-probabilities

16 bytes for a pair, so that a run never runs the reference again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.errors import FileError
from ..files.tensorfile import load_tensors
from .shards import ADVICE, Shards

BYTES_PER_PAIR = 16


class SequenceStore(Shards):
    """A folder with the log-probabilities of the answers of windows `numbers` of a data set."""

    FORMAT = "lowbit_ft reference 1"
    KEEPS = "reference's log-probabilities"

    def __init__(self, folder: Path, key: Mapping[str, Any], numbers: Sequence[int], per_shard: int):
        super().__init__(folder, key, numbers, per_shard)
        self._read: dict[int, list[Tensor]] = {}

    def write(self, shard: int, rows: Sequence[int], log_p: Tensor) -> None:
        """rows: answers of each window of the shard; log_p fp64 [sum of rows]."""
        assert len(rows) == len(self.windows(shard)) and log_p.shape == (sum(rows),)
        self.put(shard, {"rows": torch.tensor(rows, dtype=torch.int32), "log_p": log_p.double().cpu()})

    def lookup(self, numbers: Sequence[int]) -> Tensor:
        """log p fp64 of the answers of these windows, one window after the other, on the CPU. FileError when
        a file changed since it was opened or does not hold what a shard holds; ValueError for a window that
        the store has not."""
        self.opened.check()
        found = []
        for number in numbers:
            shard, within = self.place(number)
            if shard not in self._read:
                self._read[shard] = self._shard(shard)
            found.append(self._read[shard][within])
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def _shard(self, shard: int) -> list[Tensor]:
        path = self.path(shard)
        tensors = load_tensors(path)
        rows, log_p = tensors.get("rows"), tensors.get("log_p")
        if (
            rows is None
            or log_p is None
            or rows.dtype != torch.int32
            or rows.shape != (len(self.windows(shard)),)
            or log_p.dtype != torch.float64
            or bool((rows < 0).any())
            or log_p.shape != (int(rows.sum()),)
            or not bool((log_p <= 0).all())
        ):
            raise FileError(f"{path}: no shard of a reference's log-probabilities. {ADVICE}")
        return list(log_p.split(rows.tolist()))
