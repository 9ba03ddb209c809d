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

from ...files.atomic import write_bytes
from ...files.jsonfile import as_shape
from ...files.manifest import MANIFEST, file_entry, open_sealed, sealed
from ...files.records import FileEntry, Synthesis, SynthesisShard
from .base import Maker, Shard, Tell

MOST_ANSWERS = 20  # that are counted by name


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

    def put(self, number: int, shard: Shard) -> None:
        """The rows of a shard, and the files that they name."""
        data = {f"{part}/{number:05}.jsonl": _jsonl(rows) for part, rows in shard.lines.items() if rows}
        data |= shard.files
        for name in data:
            known = self._files(number).get(name)
            if os.path.lexists(self.folder / name) and _dump(known) != file_entry(self.folder / name):
                raise ValueError(f"{self.folder / name}: was not written by this run; move it away")
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        self.state.shards[f"{number:05}"] = SynthesisShard(
            files={name: _entry(content) for name, content in data.items()},
            rows={part: len(rows) for part, rows in shard.lines.items()},
            reasons=dict(Counter(row["dropped"] for row in shard.lines["dropped"])),
            tokens=shard.units,
        )
        self._save()
        for name, content in data.items():
            write_bytes(self.folder / name, content)

    def finish(self, maker: Maker, score: Mapping[str, float]) -> None:
        """All shards are there. score: of the model on their rows."""
        before, state = self.state.model_copy(deep=True), self.state
        state.done, state.unit = True, maker.unit
        state.answers, state.fates = _most(maker.answers), dict(sorted(maker.fates.items()))
        state.own_score, state.warnings = dict(score), maker.warnings()
        if self.state != before:
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

    def kept(self, number: int) -> list[dict[str, Any]]:
        """The rows of a shard that were not dropped, in their order."""
        found = list[dict[str, Any]]()
        for name in self._files(number):
            if name.partition("/")[0] in ("train", "valid"):
                # by bytes: a text may hold what Python takes for the end of a line (U+2028)
                with open(self.folder / name, "rb") as lines:
                    found += [json.loads(line) for line in lines]
        return sorted(found, key=lambda row: row["row"])

    def read(self, name: str) -> bytes:
        """A file that rows name."""
        return (self.folder / name).read_bytes()

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


def fill(folder: RowsFolder, maker: Maker, size: int, model: Any, tell: Tell) -> None:
    """Write the shards of `size` rows that are missing. tell(rows, units): so much more, after every step and
    shard."""
    shards = -(-maker.count // size)
    todo = set(folder.missing(shards))
    if folder.state.done and not todo:
        return
    for shard in range(shards):
        if shard not in todo:
            for row in folder.kept(shard):
                maker.remember(row)
            continue
        numbers = range(shard * size, min(maker.count, (shard + 1) * size))
        folder.put(shard, maker.write(numbers, model, tell))
        tell(len(numbers), 0)
    kept = (row for shard in range(shards) for row in folder.kept(shard))
    folder.finish(maker, maker.score(model, kept, folder.read))


def _entry(content: bytes) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _most(answers: Mapping[str, int]) -> dict[str, int]:
    """The most frequent answers by name, the most frequent first, and how many rows have another one."""
    order = sorted(answers.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in order[MOST_ANSWERS:])
    return dict(order[:MOST_ANSWERS]) | ({"(others)": rest} if rest else {})


def _jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
