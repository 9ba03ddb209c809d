"""From the data section of a recipe to windows of tokens.

    rows (data_read) -> tokens and loss mask (data_format) -> windows (here) -> batches (data_batches)

A window is one Example of at most `sequence_len` tokens. It is made of segments, stretches of tokens that
must not see each other: positions restart at each one, and the label of its first token is -100, since what
stands before it is another text. With packing, rows share windows (best fit over a bounded number of open
windows, so a stream packs as a file does); texts are instead joined with EOS and cut every `sequence_len`
tokens. Without it, one row is one window.

Nothing is dropped in silence: DataReport counts every row that was cut, skipped or left without a target.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from lowbit_ft.data_batches import Batches, block_diagonal_mask, collate, keeps_segments_apart
from lowbit_ft.data_format import BadRow, Formatter
from lowbit_ft.data_pack import IGNORE, Example, pack, pack_text
from lowbit_ft.data_read import DataError, read_rows

if TYPE_CHECKING:
    from lowbit_ft.recipe import DataSection, DataSource

__all__ = [
    "Batches",
    "DataError",
    "DataReport",
    "Example",
    "Examples",
    "StreamedExamples",
    "block_diagonal_mask",
    "collate",
    "keeps_segments_apart",
    "load_examples",
    "pack",
    "pack_text",
]


@dataclass
class DataReport:
    """What became of the rows: rows = used + skipped (malformed) + dropped (no target within
    sequence_len)."""

    rows: int = 0
    used: int = 0
    skipped: int = 0
    dropped: int = 0
    truncated: int = 0  # rows that lost their end
    tokens: int = 0
    target_tokens: int = 0
    windows: int = 0
    sequence_len: int = 0
    problems: list[str] = field(default_factory=list)  # of the first skipped rows
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        full = 100 * self.tokens / max(self.windows * self.sequence_len, 1)
        lines = [
            f"{self.used} of {self.rows} rows used: {self.windows} windows of {self.sequence_len} "
            f"({full:.0f} % full), {self.tokens} tokens, {self.target_tokens} of them targets"
        ]
        if self.truncated:
            lines.append(f"{self.truncated} rows truncated to {self.sequence_len} tokens")
        if self.dropped:
            lines.append(f"{self.dropped} rows dropped: no target within {self.sequence_len} tokens")
        if self.skipped:
            lines.append(f"{self.skipped} rows skipped (on_bad_row: skip), the first of them:")
            lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines + self.notes)


class Examples(Sequence[Example]):
    """Windows held in memory, 5 bytes per token. `digest` names their content."""

    streaming = False

    def __init__(self, windows: Iterable[Example], report: DataReport | None = None):
        self.report = report if report is not None else DataReport()
        self._ids, self._learned = array("i"), bytearray()
        self._segments, self._starts = array("i"), [(0, 0)]  # (token, segment) where each window starts
        for window in windows:
            self._ids.extend(window.input_ids)
            self._learned.extend(label != IGNORE for label in window.labels)
            self._segments.extend(window.segments)
            self._starts.append((len(self._ids), len(self._segments)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...  # pyright: ignore[reportIncompatibleMethodOverride]
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        (start, first), (stop, last) = self._starts[index], self._starts[index + 1]
        ids = self._ids[start:stop].tolist()
        labels = [i if t else IGNORE for i, t in zip(ids, self._learned[start:stop], strict=True)]
        return Example(ids, labels, self._segments[first:last].tolist())

    @cached_property
    def digest(self) -> str:
        """sha256 over tokens, mask and segments: a resumed run must be given the same data."""
        sha = hashlib.sha256()
        for part in (self._ids, self._learned, self._segments):
            sha.update(len(part).to_bytes(8, "little") + bytes(part))
        return sha.hexdigest()


class StreamedExamples(Examples):
    """Windows made while they are read: iterate as often as needed, each pass reads the source again.

    It has no length and no index. `report` is that of the newest pass, growing with it.
    """

    streaming = True

    def __init__(self, source: DataSource, section: DataSection, tokenizer: Any):
        super().__init__(())
        self._source, self._section, self._tokenizer = source, section, tokenizer

    def __iter__(self) -> Iterator[Example]:
        self.report = DataReport(sequence_len=self._section.sequence_len)
        formatter = Formatter(self._source.format, self._section.train_on, self._tokenizer)
        return _windows(self._source, self._section, formatter, self.report)

    def __len__(self) -> int:
        raise DataError(
            "a streamed data set has no length; set train.max_steps instead of epochs", self._source.path
        )

    def __getitem__(self, index: Any) -> Any:
        raise DataError("a streamed data set has no index; set data.streaming: false", self._source.path)

    @cached_property
    def digest(self) -> str:
        """sha256 over where the stream comes from and how it is cut; the content is not known beforehand."""
        source, section = self._source, self._section
        parts = [source.path, source.format, source.split, source.name, source.revision, source.limit]
        parts += [section.sequence_len, section.packing, section.train_on]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_examples(source: DataSource, section: DataSection, tokenizer: Any, *, seed: int = 0) -> Examples:
    """Reads `source` (recipe: data.train, data.valid or eval.data) into windows of at most
    section.sequence_len tokens.

    `seed` orders the rows before they are packed, so that a window of a file sorted by subject is not of one
    subject; texts are joined in file order. With section.streaming the result is a StreamedExamples, of which
    one window is read now to see that there is one. Raises DataError: no such file, a malformed row
    (on_bad_row: error), no usable row.
    """
    if section.sequence_len < 2:
        raise DataError(f"sequence_len {section.sequence_len}; at least 2, a token and its successor")
    if section.streaming:
        stream = StreamedExamples(source, section, tokenizer)
        if next(iter(stream), None) is None:
            raise _empty(source.path, stream.report)
        return stream
    report = DataReport(sequence_len=section.sequence_len)
    formatter = Formatter(source.format, section.train_on, tokenizer)
    if section.packing and source.format != "text":
        rows = Examples(_rows(source, section, formatter, report))
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        examples = Examples(_counted(pack((rows[i] for i in order), section.sequence_len), report), report)
    else:
        examples = Examples(_windows(source, section, formatter, report), report)
    if not len(examples):
        raise _empty(source.path, report)
    return examples


def _empty(path: str, report: DataReport) -> DataError:
    return DataError(
        f"no usable row.\n{report}" if report.rows else "the data set is empty: it has no row", path
    )


def _windows(source: Any, section: Any, formatter: Formatter, report: DataReport) -> Iterator[Example]:
    rows = _rows(source, section, formatter, report)
    if section.packing:
        rows = (pack_text if source.format == "text" else pack)(rows, section.sequence_len)
    return _counted(rows, report)


def _counted(windows: Iterable[Example], report: DataReport) -> Iterator[Example]:
    for window in windows:
        report.windows += 1
        report.tokens += len(window.input_ids)
        report.target_tokens += sum(label != IGNORE for label in window.labels)
        yield window


def _rows(source: Any, section: Any, formatter: Formatter, report: DataReport) -> Iterator[Example]:
    """One Example of one segment per usable row; cut to sequence_len unless its text is going to be joined
    and cut."""
    whole = section.packing and source.format == "text"
    report.notes = formatter.notes
    for row in read_rows(source, streaming=section.streaming):
        report.rows += 1
        try:
            if row.value is None:
                raise BadRow(row.problem)
            tokens = formatter(row.value)
        except BadRow as error:
            bad = DataError(str(error), row.file, row.number)
            if section.on_bad_row != "skip":
                hint = f"{error} (data.on_bad_row: skip passes over such rows)"
                raise DataError(hint, row.file, row.number) from error
            report.skipped += 1
            if len(report.problems) < 5:
                report.problems.append(str(bad))
            continue
        ids, learned = tokens.input_ids, tokens.learned
        cut = not whole and len(ids) > section.sequence_len
        if cut:
            ids, learned = ids[: section.sequence_len], learned[: section.sequence_len]
        labels = [IGNORE, *(i if t else IGNORE for i, t in zip(ids[1:], learned[1:], strict=True))]
        if all(label == IGNORE for label in labels):
            report.dropped += 1
            continue
        report.truncated += cut
        report.used += 1
        yield Example(ids, labels, [len(ids)])
