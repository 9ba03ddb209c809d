"""model.add_tokens: the checkpoint as it is with more tokens, before anything is trained.

    tokenizer   the checkpoint's, with the new tokens behind the others
    tables      embedding and head grow where they have no row for them; a new row is the mean of the old
                ones (the convention of transformers' resize_token_embeddings, without its noise), or a copy
                of another token's

Nothing of it is copied: rows are put into a table while it is read. Whoever packs, walks, evaluates or writes
the model takes this checkpoint for the dense one, so every stage agrees on what a new token is at the start.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..names import did_you_mean
from .checkpoint import Checkpoint
from .rows import untrainable
from .shipped import unexchangeable

PIECE = 1 << 24  # numbers of a table that are read at a time


@dataclass(frozen=True)
class NewTokens:
    """The ids of the new tokens, how many rows the tables have with them, and the token whose rows theirs
    begin as (None: the mean). levels: of a code whose points the last are, rows made of vectors (rows.py)."""

    ids: tuple[int, ...]
    rows: int
    copied: int | None = None
    levels: tuple[int, ...] = ()


def token_problems(tokenizer: Any, tokens: Sequence[str], copied: str | None) -> list[str]:
    """What is wrong with new tokens, a sentence each."""
    known = tokenizer.get_vocab()
    found: list[str] = []
    seen: set[str] = set()
    for i, token in enumerate(tokens):
        if not token.strip():
            found.append(f"got {token!r} as token {i}; allowed: text that is not blank")
        elif token in seen:
            found.append(f"got {token!r} twice; give it once")
        elif token in known:
            found.append(f"got {token!r}, which the tokenizer has already (id {known[token]}); leave it out")
        seen.add(token)
    if copied is not None and copied not in known:
        found.append(
            f"init: got copy_of {copied!r}, which is no token of the vocabulary{did_you_mean(copied, known)}"
        )
    return found


def add_tokens(
    tokenizer: Any,
    tokens: Sequence[str],
    special: bool,
    copied: str | None,
    rows: int,
    levels: tuple[int, ...] = (),
) -> NewTokens:
    """Add them to the tokenizer, in place. rows: of the model's tables now."""
    source = None if copied is None else tokenizer.convert_tokens_to_ids(copied)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    assert len(set(ids)) == len(tokens), f"{tokens} became {ids}"
    return NewTokens(ids, max(rows, max(ids) + 1), source, levels)


def tables_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Module name of embedding and head -> the file tensor of its table. ValueError where new rows could not
    be put into one, or train."""
    model = checkpoint.empty_model("eager")
    ends, found = (model.get_input_embeddings(), model.get_output_embeddings()), {}
    for name, module in model.named_modules():
        if not any(module is end for end in ends if end is not None):
            continue
        parameter = f"{name}.weight"
        if reason := unexchangeable(checkpoint, parameter) or checkpoint.packed_key(parameter):
            raise ValueError(f"{name}: {reason}" if " " in reason else f"{name} is packed in the checkpoint")
        if reason := untrainable(module):
            raise ValueError(f"{name} {reason}")
        found[name] = checkpoint.keys_for(parameter)[0]
    return found


class GrownCheckpoint(Checkpoint):
    """`below` with new tokens. folder: where its config.json and tokenizer are (the weights stay where they
    are). ValueError where another tensor of the model would have to grow too."""

    def __init__(self, below: Checkpoint, folder: Path, new: NewTokens) -> None:
        tables = tables_of(below)
        self.__dict__.update(vars(below))
        self.below, self.folder, self.new, self.tables = below, folder, new, tables
        # by place, so that a head that is given a name of its own later is one too
        self._places = {(below.entry(key).file, below.entry(key).start) for key in tables.values()}
        self._started: dict[tuple[Path, int], Tensor] = {}
        old = {name: p.shape for name, p in below.empty_model("eager").named_parameters()}
        self.config = copy.deepcopy(below.config)
        self.config.get_text_config().vocab_size = new.rows
        self._plan, self._matrices = None, {}
        grown = {f"{name}.weight" for name in tables}
        for name, parameter in self.empty_model("eager").named_parameters():
            if (parameter.shape != old[name]) != (name in grown and new.rows != old[name][0]):
                raise ValueError(
                    f"{below.source}: with {new.rows} tokens its {name} is {list(parameter.shape)} (it is "
                    f"{list(old[name])} now), and only an embedding and a head can grow here"
                )

    def _is_table(self, name: str) -> bool:
        entry = self.entry(name)
        return (entry.file, entry.start) in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        return (self.new.rows, *shape[1:]) if self._is_table(name) else shape

    @property
    def nbytes(self) -> int:
        tables = {key: (self.below.shape(key)[0], self.below.entry(key)) for key in self.tables.values()}
        more = sum((self.new.rows - count) * entry.nbytes // count for count, entry in tables.values())
        return self.below.nbytes + more

    def fingerprint(self) -> list[list[Any]]:
        """The files' own, and the tokens: the folder of the tokenizer is written anew by every start."""
        return [*self.below.fingerprint(), ["new tokens", *self.new.ids, self.new.rows, self.new.copied]]

    def read(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        row: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        if not self._is_table(name):
            return super().read(name, device=device, dtype=dtype, row=row, rows=rows)
        assert row is None, f"{name}: a table is read by rows"
        first, last = rows or (0, self.new.rows)
        there = super().shape(name)[0]
        dtype = dtype or self.stored_dtype(name)
        out = torch.empty((last - first, super().shape(name)[1]), dtype=dtype, device=device)
        if (end := min(last, there)) > first:
            out[: end - first] = super().read(name, device=device, dtype=dtype, rows=(first, end))
        if last > there:  # rows without a token, where ids leave some out
            out[max(there - first, 0) :] = 0
        mine = [i for i in self.new.ids if first <= i < last]
        if mine:
            out[[i - first for i in mine]] = self._start(name).to(device, dtype)
        return out

    def stored_pieces(self, name: str) -> Iterator[Tensor]:
        if not self._is_table(name):
            return super().stored_pieces(name)
        count, width = self.shape(name)
        step = max(1, PIECE // width)
        return (self.read(name, rows=(i, min(i + step, count))).view(-1) for i in range(0, count, step))

    def _start(self, name: str) -> Tensor:
        """What a new row begins as [H], in the stored dtype."""
        entry, dtype = self.entry(name), self.stored_dtype(name)
        place = (entry.file, entry.start)
        if place not in self._started:
            count, width = super().shape(name)
            if (copied := self.new.copied) is not None:
                value = super().read(name, rows=(copied, copied + 1))[0]
            else:
                old = torch.ones(count, dtype=torch.bool)
                old[[i for i in self.new.ids if i < count]] = False
                total, step = torch.zeros(width, dtype=torch.float64), max(1, PIECE // width)
                for first in range(0, count, step):
                    last = min(first + step, count)
                    part = super().read(name, rows=(first, last), dtype=torch.float32)
                    total += part[old[first:last]].sum(0, dtype=torch.float64)
                value = (total / int(old.sum())).to(dtype)
            self._started[place] = value
        return self._started[place]
