"""From the data section of a recipe to windows of tokens.

    rows (read) -> tokens and loss mask (formats/) -> windows (here) -> batches (batches)

A window is one Example of at most `sequence_len` tokens. It is made of segments, stretches of tokens that
must not see each other: positions restart at each one, and the label of its first token is -100, since what
stands before it is another text. With packing, rows share windows (best fit over a bounded number of open
windows, so a stream packs as a file does); texts are instead joined with EOS and cut every `sequence_len`
tokens. Without it, one row is one window.

`source` and `section` are a DataSource and the DataSection of a recipe, which is a floor above.

Nothing is dropped in silence: DataReport counts every row that was cut, skipped, left without a target or not
written whole, and every column that was not read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any

from .columns import unread
from .errors import BadRow, DataError
from .formats import Format, format_of
from .pack import join, pack, pack_text
from .read import read_rows
from .windows import IGNORE, DataReport, Example, Examples


class StreamedExamples(Examples):
    """Windows made while they are read: iterate as often as needed, each pass reads the source again.

    It has no length and no index. `report` is that of the newest pass, growing with it.
    """

    streaming = True

    def __init__(self, source: Any, section: Any, tokenizer: Any, rows: int | None = None):
        super().__init__(())
        self._source, self._section, self._tokenizer, self._rows = source, section, tokenizer, rows

    def __iter__(self) -> Iterator[Example]:
        self.report = DataReport(sequence_len=self._section.sequence_len)
        formatter = format_of(self._source.format, self._section.train_on, self._tokenizer)
        return _windows(self._source, self._section, formatter, self.report, self._rows)

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


def load_examples(
    source: Any, section: Any, tokenizer: Any, *, seed: int = 0, rows: int | None = None
) -> Examples:
    """Reads `source` (recipe: data.train, data.valid or eval.data) into windows of at most
    section.sequence_len tokens.

    `rows` is how many tokens the model has an embedding of (None: not known): a row with another token is a
    malformed one. `seed` orders the rows before they are packed, so that a window of a file sorted by subject
    is not of one subject; texts are joined in file order. With section.streaming the result is a
    StreamedExamples, of which one window is read now to see that there is one.

    Raises DataError: no such file, a malformed row (on_bad_row: error), no usable row.
    """
    if section.sequence_len < 2:
        raise DataError(f"sequence_len {section.sequence_len}; at least 2, a token and its successor")
    if section.streaming:
        stream = StreamedExamples(source, section, tokenizer, rows)
        if next(iter(stream), None) is None:
            raise _empty(source.path, stream.report)
        return stream
    report = DataReport(sequence_len=section.sequence_len)
    formatter = format_of(source.format, section.train_on, tokenizer)
    if section.packing and not formatter.joined:
        single = Examples(_rows(source, section, formatter, report, rows))
        order = list(range(len(single)))
        random.Random(seed).shuffle(order)
        examples = Examples(_counted(pack((single[i] for i in order), section.sequence_len), report), report)
    else:
        examples = Examples(_windows(source, section, formatter, report, rows), report)
    if not len(examples):
        raise _empty(source.path, report)
    return examples


def _empty(path: str, report: DataReport) -> DataError:
    return DataError(
        f"no usable row.\n{report}" if report.rows else "the data set is empty: it has no row", path
    )


def _windows(
    source: Any, section: Any, formatter: Format, report: DataReport, rows: int | None
) -> Iterator[Example]:
    windows = _rows(source, section, formatter, report, rows)
    if section.packing:
        windows = (pack_text if formatter.joined else pack)(windows, section.sequence_len)
    return _counted(windows, report)


def _counted(windows: Iterable[Example], report: DataReport) -> Iterator[Example]:
    for window in windows:
        report.windows += 1
        report.tokens += len(window.input_ids)
        report.target_tokens += sum(label != IGNORE for label in window.labels)
        yield window


def _rows(
    source: Any, section: Any, formatter: Format, report: DataReport, rows: int | None
) -> Iterator[Example]:
    """One Example per usable row, of a segment for each of its sequences; these are cut to their share of
    sequence_len unless the text is going to be joined and cut."""
    whole = section.packing and formatter.joined
    report.notes = list(formatter.notes)
    for row in read_rows(source, streaming=section.streaming, notes=report.notes):
        report.rows += 1
        try:
            if row.value is None:
                raise BadRow(row.problem)
            tokens = formatter(row.value)
            if rows is not None and max(tokens.input_ids, default=0) >= rows:
                raise BadRow(
                    f"its token {max(tokens.input_ids)} has no row in the model's embedding of {rows}"
                )
            ignored = unread(row.value, formatter.reads(row.value))
        except BadRow as error:
            bad = DataError(str(error), row.file, row.number)
            if section.on_bad_row != "skip":
                hint = f"{error} (data.on_bad_row: skip passes over such rows)"
                raise DataError(hint, row.file, row.number) from error
            report.skipped += 1
            if len(report.problems) < 5:
                report.problems.append(str(bad))
            continue
        for name in ignored:
            report.unread[name] = report.unread.get(name, 0) + 1
        for name in tokens.lost:
            report.lost[name] = report.lost.get(name, 0) + 1
        report.incomplete += bool(tokens.lost)
        ids, learned = tokens.input_ids, tokens.learned
        if not any(learned):
            report.masked += 1
            continue
        sizes = tokens.sizes or (len(ids),)
        most = len(ids) if whole else section.sequence_len // len(sizes)
        parts = []
        for end, size in zip(accumulate(sizes), sizes, strict=True):
            start, stop = end - size, end - size + min(size, most)
            targets = zip(ids[start + 1 : stop], learned[start + 1 : stop], strict=True)
            labels = [IGNORE, *(i if t else IGNORE for i, t in targets)]
            parts.append(Example(ids[start:stop], labels, [stop - start]))
        if any(all(label == IGNORE for label in part.labels) for part in parts):
            report.dropped += 1
            continue
        report.truncated += max(sizes) > most
        report.used += 1
        yield join(parts)
