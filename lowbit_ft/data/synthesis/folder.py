"""synthesis/ of a run: the rows, shard by shard, and the manifest that knows them.

    lowbit_ft.json        what the rows are made of (key), counts, and every file with its hash; sealed
    train/00000.jsonl     the rows of shard 0 to train on      {"input_ids", "text" | "messages", ...}
    valid/00000.jsonl     rows for validation
    dropped/00000.jsonl   what the filter left out, with the reason

A shard is a batch: `batch_size` rows that are written together, which fixes every product down to its last
bit, so a run that was killed writes the missing shards as they would have been. The manifest lists the files
of a shard before they are there; a listed file that is missing is written anew, one with another content was
changed by somebody and is refused, and so is one that stands in the way and is not listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...files.atomic import write_bytes
from ...files.jsonfile import as_shape
from ...files.manifest import MANIFEST, file_entry, open_sealed, sealed
from ...files.records import FileEntry, Synthesis, SynthesisShard
from .base import Row, Rows, SynthesisConfig, Voice
from .filters import why_dropped
from .write import write_rows

PARTS = ("train", "valid", "dropped")
SEEN = "seen before"


class RowsFolder:
    """synthesis/ for one key. ValueError where a file in it is not what was written there."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.state = read_state(folder) if os.path.lexists(folder / MANIFEST) else Synthesis(key=key)
        if self.state.key != key:
            self._clear()

    def by(self, choose: Callable[[], str]) -> str:
        """The model that writes: the one that the rows here are of, else what `choose` says."""
        if self.state.by is None:
            self.state.by = choose()
        return self.state.by

    def missing(self, shards: int) -> list[int]:
        """The shards of 0 .. shards - 1 that are to be written."""
        return [number for number in range(shards) if not self._whole(number)]

    def put(self, number: int, lines: Mapping[str, Sequence[dict[str, Any]]], tokens: int) -> None:
        """The rows of a shard: part -> rows."""
        data = {f"{part}/{number:05}.jsonl": _jsonl(rows) for part, rows in lines.items() if rows}
        for name in data:
            known = self._files(number).get(name)
            if os.path.lexists(self.folder / name) and _dump(known) != file_entry(self.folder / name):
                raise ValueError(f"{self.folder / name}: was not written by this run; move it away")
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        self.state.shards[f"{number:05}"] = SynthesisShard(
            files={name: _entry(content) for name, content in data.items()},
            rows={part: len(rows) for part, rows in lines.items()},
            reasons=dict(Counter(row["dropped"] for row in lines["dropped"])),
            tokens=tokens,
        )
        self._save()
        for name, content in data.items():
            write_bytes(self.folder / name, content)

    def finish(self) -> None:
        """All shards are there."""
        if not self.state.done:
            self.state.done = True
            self._save()

    def _files(self, number: int) -> dict[str, FileEntry]:
        shard = self.state.shards.get(f"{number:05}")
        return {} if shard is None else dict(shard.files)

    def _whole(self, number: int) -> bool:
        if f"{number:05}" not in self.state.shards:
            return False
        files = self._files(number)
        refuse_changed(self.folder, files)
        return all((self.folder / name).is_file() for name in files)

    def names(self, number: int) -> list[str]:
        """Of the rows of a shard that were not dropped."""
        found = list[str]()
        for name in self._files(number):
            if not name.startswith("dropped/"):
                # by bytes: a text may hold what Python takes for the end of a line (U+2028)
                with open(self.folder / name, "rb") as lines:
                    found += [row_name(json.loads(line)["input_ids"]) for line in lines]
        return found

    def _clear(self) -> None:
        """The rows of another recipe go, as far as they are what was written."""
        files = {name: entry for shard in self.state.shards.values() for name, entry in shard.files.items()}
        refuse_changed(self.folder, files)
        for name in files:
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / MANIFEST).unlink()
        self.state = Synthesis(key=self.key)

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / MANIFEST, sealed(self.state.model_dump(mode="json")))


def read_state(folder: Path) -> Synthesis:
    """The manifest of synthesis/. ValueError when it is missing or was changed."""
    return as_shape(open_sealed(folder / MANIFEST), Synthesis, str(folder / MANIFEST))


def refuse_changed(folder: Path, files: Mapping[str, FileEntry], whole: bool = False) -> None:
    """ValueError naming a file whose content is not the one that was written; with whole also a missing
    one."""
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}: is no file of this folder; remove it, and it is written again")
        if not path.is_file():
            if whole:
                raise ValueError(f"{path}: missing; run the line again (lowbit-ft run), it is written again")
        elif file_entry(path) != entry.model_dump():
            raise ValueError(
                f"{path}: its content is not the one that was written; remove it and run the line again "
                "(lowbit-ft run): the model writes it as it was"
            )


def _dump(entry: FileEntry | None) -> Any:
    return None if entry is None else entry.model_dump()


def row_name(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def fill(
    folder: RowsFolder,
    config: SynthesisConfig,
    rows: Rows,
    voice: Voice,
    model: Any,
    tell: Callable[[int, int], None],
) -> None:
    """Write the shards that are missing. tell(rows, tokens): so much more, after every step and shard."""
    size, shards = config.batch_size, -(-rows.count // config.batch_size)
    todo, seen = set(folder.missing(shards)), set[str]()

    def drawable(vocabulary: int) -> torch.Tensor:
        return torch.tensor(
            [i < voice.size and (i not in voice.special or i in rows.drawable) for i in range(vocabulary)]
        )

    for shard in range(shards) if todo else ():
        if shard not in todo:
            seen.update(folder.names(shard))
            continue
        numbers = range(shard * size, min(rows.count, (shard + 1) * size))
        batch = [rows[number] for number in numbers]
        write_rows(
            model,
            batch,
            numbers,
            seed=config.seed,
            max_len=voice.max_len,
            temperature=config.temperature,
            top_p=config.top_p,
            drawable=drawable,
            tell=lambda tokens: tell(0, tokens),
        )
        lines: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        for number, row in zip(numbers, batch, strict=True):
            part, stored = _judged(row, number, config, voice, seen)
            lines[part].append(stored)
        folder.put(shard, lines, sum(len(row.ids) for row in batch))
        tell(len(batch), 0)
    folder.finish()


def _judged(
    row: Row, number: int, config: SynthesisConfig, voice: Voice, seen: set[str]
) -> tuple[str, dict[str, Any]]:
    """The part that a row belongs to, and the row as it is stored."""
    stored = {"row": number, "input_ids": row.ids, **row.facts()}
    wrote = row.wrote()
    reason = why_dropped(wrote, "".join(voice.text(part) for part in wrote), config.filter)
    name = row_name(row.ids)
    if reason is None and name in seen:
        reason = SEEN
    if reason is not None:
        return "dropped", {**stored, "dropped": reason}
    seen.add(name)
    return ("valid" if number < config.valid else "train"), stored


def _entry(content: bytes) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
