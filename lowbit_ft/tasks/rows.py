"""Rows with answers: read by data/read.py, encoded by the tokenizer, counted.

    row (columns)  ->  [Encoded]: what the tokenizer makes of its text, and its answer; or pieces of them

Nothing is dropped in silence: RowReport counts rows that were cut, skipped or had columns nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from ..data.errors import BadRow, DataError, kind, told
from ..data.mix import named, sources_of
from ..data.read import read_rows

Encoded = dict[str, Any]  # input_ids [L] and friends, and the answer, as plain numbers and lists


@dataclass
class RowReport:
    """What became of the rows: rows = used + skipped (malformed). pieces: what they became, one to a row
    where none is cut in several; tokens: 0 of images. answers: how often each is there."""

    rows: int = 0
    used: int = 0
    pieces: int = 0
    skipped: int = 0
    truncated: int = 0
    tokens: int = 0
    longest: int = 0
    limit: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    apart: Counter[str] = field(default_factory=Counter)  # what is in rows and not learned

    def __str__(self) -> str:
        lines = [f"{self.used:,} of {self.rows:,} rows used"]
        if self.tokens:
            what = "row" if self.pieces == self.used else "piece"
            pieces = "" if what == "row" else f"{self.pieces:,} pieces, "
            lines[0] += f": {pieces}{self.tokens:,} tokens, the longest {what} {self.longest:,}"
        if self.answers:
            told = [f"{name} {count:,}" for name, count in self.answers.most_common(10)]
            more = f" and {len(self.answers) - 10} more" if len(self.answers) > 10 else ""
            lines.append(f"answers: {', '.join(told)}{more}")
        lines += [f"not learned: {count:,} {what}" for what, count in self.apart.items()]
        if self.truncated:
            lines.append(f"{self.truncated:,} rows truncated to {self.limit:,} tokens")
        if self.unread:
            lines.append(
                f"columns not read: {', '.join(f'{n} ({c})' for n, c in self.unread.most_common(10))}"
            )
        if self.skipped:
            lines.append(f"{self.skipped:,} rows skipped (on_bad_row: skip), the first of them:")
            lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines + self.notes)


class Rows(Sequence[Encoded]):
    """Encoded rows in memory. `digest` names their content."""

    streaming = False

    def __init__(self, rows: Iterable[Encoded], report: RowReport | None = None):
        self._rows = list(rows)
        self.report = report if report is not None else RowReport()

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...  # pyright: ignore[reportIncompatibleMethodOverride]
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        return self._rows[index]

    @cached_property
    def digest(self) -> str:
        """sha256 over everything in them: a resumed run must be given the same data."""
        sha = hashlib.sha256()
        for row in self._rows:
            sha.update(json.dumps(row, sort_keys=True, default=_named).encode())
        return sha.hexdigest()

    def by_length(self) -> Rows:
        """The longest first, so that rows of a batch are alike."""
        return Rows(sorted(self._rows, key=lambda row: -len(row.get("input_ids", ()))), self.report)


def _named(value: Any) -> str:
    """Bytes (of an image) by their digest, and so a file that is kept."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value.digest


@dataclass(frozen=True)
class Encoder:
    """How a task reads a row. encode(row, folder of its file) -> what becomes of it, BadRow where that is
    nothing; answers(piece) -> its answers as words for the report; reads: the columns; filled: a piece has a
    token at least."""

    encode: Callable[[Mapping[str, Any], Path], list[Encoded]]
    answers: Callable[[Encoded], Iterable[str]]
    reads: frozenset[str]
    filled: bool = False


def read_encoded(source: Any, section: Any, encoder: Encoder, rows: int | None) -> Rows:
    """The rows of a source, or of several one after the other. rows: of the model's embedding. DataError for
    a malformed row (on_bad_row: error), or no usable one."""
    report = RowReport(limit=section.sequence_len)
    found = Rows(_encoded(source, section, encoder, rows, report), report)
    if not len(found):
        said = f"no usable row.\n{report}" if report.rows else "the data set is empty: it has no row"
        raise DataError(said, named(source))
    return found


def _encoded(
    source: Any, section: Any, encoder: Encoder, rows: int | None, report: RowReport
) -> Iterator[Encoded]:
    for one in sources_of(source):
        for row in read_rows(one, notes=report.notes):
            report.rows += 1
            try:
                if row.value is None:
                    raise BadRow(row.problem or "not a row")
                made = encoder.encode(row.value, row.beside)
                if encoder.filled and not all(piece["input_ids"] for piece in made):
                    raise BadRow("its text has no token, so nothing of it can be looked at")
                beyond = max((max(piece.get("input_ids", ()), default=0) for piece in made), default=0)
                if rows is not None and beyond >= rows:
                    raise BadRow(f"its token {beyond} has no row in the model's embedding of {rows}")
            except BadRow as error:
                if section.on_bad_row != "skip":
                    hint = f"{error} (data.on_bad_row: skip passes over such rows)"
                    raise DataError(hint, row.file, row.number) from error
                report.skipped += 1
                if len(report.problems) < 5:
                    report.problems.append(str(DataError(str(error), row.file, row.number)))
                continue
            report.unread.update(name for name in row.value if name not in encoder.reads)
            report.used += 1
            for piece in made:
                report.answers.update(encoder.answers(piece))
                report.truncated += bool(piece.pop("cut", False))
                report.apart.update(piece.pop("apart", {}))
                size = len(piece.get("input_ids", ()))
                report.pieces, report.tokens = report.pieces + 1, report.tokens + size
                report.longest = max(report.longest, size)
                yield piece


def encoded_text(tokenizer: Any, limit: int, *texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of a text, or a pair, with its special tokens; cut to `limit` tokens, of a
    pair the longer one first. Its `cut`: whether it was."""
    made = tokenizer(
        *texts, truncation=True, max_length=limit, verbose=False, return_overflowing_tokens=False, **options
    )
    made["cut"] = False
    if len(made["input_ids"]) >= limit:
        whole = tokenizer(*texts, truncation=False, verbose=False, **options)
        made["cut"] = len(whole["input_ids"]) > limit
    return made


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column. BadRow."""
    value = of_column(row, column)
    if not isinstance(value, str):
        raise BadRow(f"{column!r} must be a string; got {kind(value)}")
    return value


def place_of(name: str | Path, folder: Path) -> Path:
    """A file that a row names: from the folder of the row's own file, or, where it is not there, the current
    one. RuntimeError for "~who" of nobody."""
    path = Path(name).expanduser()
    beside = folder / path
    return path if path.is_file() and not beside.is_file() else beside


def of_column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        keys = ", ".join(repr(key) for key in list(row)[:8]) or "none"
        raise BadRow(f"key {column!r} is missing; the row's keys are: {keys}")
    return row[column]


def number_of(row: Mapping[str, Any], column: str) -> float:
    """The number in a column; text of one too (csv). BadRow."""
    value = of_column(row, column)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{column!r} must be a finite number; got {told(value)}")
    return number
