"""Padded batches of encoded rows, in the fixed, resumable order of data/batches.py.

Padding is on the right, masked by attention_mask (zeros), and no answer stands there. A batch is as long as
its longest row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.windows import IGNORE
from .rows import Encoded

PADS = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORE}  # beside input_ids
Shown = Callable[[Any, str], Encoded]  # (a row, what decides what is drawn of it) -> what a batch shows of it


class RowBatches(Batches):
    """Over Rows, or windows. taken: the names of what the model takes; all else but `answers` stays out.
    shown: what a batch shows of a row; its key is of the seed, the epoch and the row."""

    def __init__(self, *args: Any, taken: frozenset[str], shown: Shown, **options: Any):
        super().__init__(*args, **options)
        self.taken, self.shown = taken, shown

    def _collate(self, windows: Sequence[Any], numbers: Sequence[int]) -> dict[str, Tensor]:
        rows = [
            self.shown(window, f"{self.seed}/{self.epoch}/{number}")
            for window, number in zip(windows, numbers, strict=True)
        ]
        return pad(rows, self.pad_id, self.taken)


def pad(rows: Sequence[Encoded], pad_id: int, taken: frozenset[str]) -> dict[str, Any]:
    """Encoded rows -> int64 [B, L] of each list of integers, L the longest; of answers that are one to a row
    [B], [B, C] in fp32 of lists of floats, and tensors stacked. What is a dict of tensors, which are of
    another length in every row, stays one: a list of B of them."""
    length = max(len(row.get("input_ids", ())) for row in rows)
    batch: dict[str, Any] = {}
    for name in rows[0]:
        if name not in taken:
            continue
        values = [row[name] for row in rows]
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
            continue
        if isinstance(values[0], dict):
            batch[name] = values
            continue
        if not isinstance(values[0], list) or isinstance(values[0][0], float):  # one answer to a row
            batch[name] = torch.tensor(values)
            continue
        filler = pad_id if name == "input_ids" else PADS[name]
        batch[name] = torch.tensor([value + [filler] * (length - len(value)) for value in values])
    return batch


def taken_by(model: nn.Module, answers: Sequence[str]) -> frozenset[str]:
    """The names of what a batch for this model holds: what its forward takes, and the answers."""
    forward: Any = type(model).forward
    return frozenset(inspect.signature(forward).parameters) | frozenset(answers)
