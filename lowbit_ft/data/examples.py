"""From the data section of a recipe to windows of tokens.

    rows (read) -> tokens and loss mask (formats/) -> windows (here) -> batches (batches)

A window is one Example of at most `sequence_len` tokens. It is made of segments, stretches of tokens that
must not see each other: positions restart at each one, and the label of its first token is -100, since what
stands before it is another text. With packing, rows share windows (best fit over a bounded number of open
windows, so a stream packs as a file does); texts are instead joined with EOS and cut every `sequence_len`
tokens. Without it, one row is one window.

`source` and `section` are a DataSource (or a list of them, mixed row by row before anything is packed:
mix.py) and the DataSection of a recipe, which is a floor above.

Nothing is dropped in silence: DataReport counts every row that was cut, skipped, left without a target or not
written whole, and every column that was not read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from .columns import unread
from .errors import BadRow, DataError
from .formats import Format, format_of, told
from .mix import mixed, named, sources_of, unmixable, weights_of
from .pack import join, pack, pack_text
from .read import read_rows
from .windows import IGNORE, DataReport, Example, Examples, Share


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
        made = _Source.all_of(self._source, self._section, self._tokenizer, self._rows)
        rows = made[0].rows(self.report) if len(made) == 1 else _in_turn(made, self._section, self.report)
        return _packed(rows, self._section, made[0].formatter, self.report)

    def __len__(self) -> int:
        raise DataError(
            "a streamed data set has no length; set train.max_steps instead of epochs", named(self._source)
        )

    def __getitem__(self, index: Any) -> Any:
        raise DataError("a streamed data set has no index; set data.streaming: false", named(self._source))

    @cached_property
    def digest(self) -> str:
        """sha256 over where the stream comes from and how it is cut; the content is not known beforehand."""
        sources, section = sources_of(self._source), self._section
        parts: list[Any] = []
        for source in sources:
            parts += [source.path, source.format, source.split, source.name, source.revision, source.limit]
        parts += [section.sequence_len, section.packing, section.train_on]
        if len(sources) > 1:
            parts += [weights_of(sources), section.stopping_strategy]
        parts += section.chat
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_examples(
    source: Any, section: Any, tokenizer: Any, *, seed: int = 0, rows: int | None = None
) -> Examples:
    """Reads `source` (recipe: data.train, data.valid or eval.data; or a list of sources) into windows of at
    most section.sequence_len tokens.

    `rows` is how many tokens the model has an embedding of (None: not known): a row with another token is a
    malformed one. `seed` orders the rows before they are packed, so that a window of a file sorted by subject
    is not of one subject; texts of one source are joined in file order. With section.streaming the result is
    a StreamedExamples, of which one window is read now to see that there is one.

    Raises DataError: no such file, a malformed row (on_bad_row: error), no usable row.
    """
    if section.sequence_len < 2:
        raise DataError(f"sequence_len {section.sequence_len}; at least 2, a token and its successor")
    if section.streaming:
        stream = StreamedExamples(source, section, tokenizer, rows)
        if next(iter(stream), None) is None:
            raise _empty(named(source), stream.report)
        return stream
    report = DataReport(sequence_len=section.sequence_len)
    made = _Source.all_of(source, section, tokenizer, rows)
    if len(made) > 1:
        singles = _shuffled(made, section, report, seed)
    else:
        singles = made[0].rows(report)
        if section.packing and not made[0].formatter.joined:
            held = Examples(singles)
            order = list(range(len(held)))
            random.Random(seed).shuffle(order)
            singles = (held[i] for i in order)
    examples = Examples(_packed(singles, section, made[0].formatter, report), report)
    if not len(examples):
        raise _empty(named(source), report)
    return examples


def _empty(path: str, report: DataReport) -> DataError:
    return DataError(
        f"no usable row.\n{report}" if report.rows else "the data set is empty: it has no row", path
    )


@dataclass(frozen=True)
class _Source:
    """A source and how its rows are read."""

    source: Any
    section: Any
    formatter: Format
    embedded: int | None  # tokens that the model has an embedding of

    @classmethod
    def all_of(cls, source: Any, section: Any, tokenizer: Any, embedded: int | None) -> list[_Source]:
        """Those of one source, or of a list. DataError: they make no mixture."""
        sources = sources_of(source)
        if len(sources) > 1 and (why := unmixable(sources, section.packing)):
            raise DataError(why, named(source))
        return [cls(s, section, format_of(s.format, section.train_on, tokenizer), embedded) for s in sources]

    def rows(self, report: DataReport) -> Iterator[Example]:
        return _rows(self.source, self.section, self.formatter, report, self.embedded)

    def share(self, weight: float | None) -> Share:
        return Share(f"{self.source.path} ({self.source.format})", weight)


def _shares(made: list[_Source]) -> list[Share]:
    weights = weights_of([m.source for m in made]) or [None] * len(made)
    return [m.share(weight) for m, weight in zip(made, weights, strict=True)]


def _in_turn(made: list[_Source], section: Any, report: DataReport) -> Iterator[Example]:
    """The rows of several streams, each in its own order; what is read again is not counted again."""
    report.sources = _shares(made)

    def reader(one: _Source) -> Callable[[int], Iterator[Example]]:
        return lambda turn: one.rows(report if turn == 0 else DataReport())

    sources = [m.source for m in made]
    for i, row in mixed(sources, [reader(m) for m in made], section.stopping_strategy):
        report.sources[i].drawn += 1
        yield row


def _shuffled(made: list[_Source], section: Any, report: DataReport, seed: int) -> Iterator[Example]:
    """The rows of an epoch of several sources, shuffled; which rows of a source, where not all are in it, is
    the seed's choice too."""
    held = [Examples(m.rows(report)) for m in made]

    def order(i: int) -> Callable[[int], Iterator[int]]:
        def pass_of(turn: int) -> Iterator[int]:
            rows = list(range(len(held[i])))
            random.Random(f"{seed}/{i}/{turn}").shuffle(rows)
            return iter(rows)

        return pass_of

    sources = [m.source for m in made]
    epoch = list(mixed(sources, [order(i) for i in range(len(made))], section.stopping_strategy))
    random.Random(seed).shuffle(epoch)
    report.sources = _shares(made)
    for i, _ in epoch:
        report.sources[i].drawn += 1
    for share, rows in zip(report.sources, held, strict=True):
        share.usable = len(rows)
        report.left += max(len(rows) - share.drawn, 0)
    report.used -= report.left
    return (held[i][row] for i, row in epoch)


def _packed(
    rows: Iterator[Example], section: Any, formatter: Format, report: DataReport
) -> Iterator[Example]:
    if section.packing:
        rows = (pack_text if formatter.joined else pack)(rows, section.sequence_len)
    return _counted(rows, report)


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
    report.notes += [note for note in formatter.notes if note not in report.notes]
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
            bad = DataError(told(error), row.file, row.number)
            if section.on_bad_row != "skip":
                hint = f"{told(error)} (data.on_bad_row: skip passes over such rows)"
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
        if len(parts) > 1 and all(part == parts[0] for part in parts[1:]):
            report.alike += 1
            continue
        report.truncated += max(sizes) > most
        report.used += 1
        yield join(parts)
