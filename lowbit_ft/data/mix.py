"""One order of the rows of several sources (data.train or data.valid as a list).

Without weights every row stands in an epoch once. With weights the next row is of the source that is furthest
behind its share, so that every stretch of an epoch has the shares as near as whole rows can have them; no
draw decides, and a seed is for the order alone. As in `datasets.interleave_datasets` an epoch ends when the
first source has given its last row (`first_exhausted`), or when every source has (`all_exhausted`: one that
ended before begins again). Which rows these are is settled once: every epoch of a run has the same ones.

Rows that are joined and cut (texts) are not mixed with rows that are kept whole, nor pairs with single
answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from .errors import DataError
from .formats import FORMATS

T = TypeVar("T")
_END: Any = object()


def sources_of(given: Any) -> list[Any]:
    """The sources of data.train, data.valid or eval.data: one, several, or none (None)."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def named(given: Any) -> str:
    """The paths of one source, or of several."""
    return ", ".join(source.path for source in sources_of(given))


def weights_of(sources: Sequence[Any]) -> list[float] | None:
    """The weights of sources; None where none is given."""
    found = [weight for s in sources if (weight := getattr(s, "weight", None)) is not None]
    return found if len(found) == len(sources) else None


def unmixable(sources: Sequence[Any], packing: bool) -> str | None:
    """Why these sources make no mixture; None when they do."""
    formats = [source.format for source in sources if source.format is not None]
    if len({FORMATS[name].pairs for name in formats}) > 1:
        return (
            f"got formats {', '.join(formats)}: rows of two answers beside rows of one, which no signal "
            "learns from together; give format: chosen to those of two, or runs of their own"
        )
    if packing and len({FORMATS[name].joined for name in formats}) > 1:
        return (
            f"got formats {', '.join(formats)}: texts are joined and cut at window ends, other rows are kept "
            "whole, and one window cannot be both; set data.packing: false, or give runs of their own"
        )
    given = [source.path for source in sources if getattr(source, "weight", None) is not None]
    if given and len(given) < len(sources):
        without = ", ".join(s.path for s in sources if getattr(s, "weight", None) is None)
        return (
            f"got a weight for {', '.join(given)} and none for {without}; give every source a weight, or none"
        )
    return None


class _Source(Generic[T]):
    """A source, its next row, and what it has given."""

    def __init__(self, path: str, rows: Callable[[int], Iterator[T]]):
        self.path, self._rows, self._passes = path, rows, 0
        self.taken, self.ended = 0, False
        self._begin()

    def _begin(self) -> None:
        self._open = self._rows(self._passes)
        self._passes += 1
        self._next: T = next(self._open, _END)
        if self._next is _END:
            raise DataError("no usable row; mend its rows, or take it off the list of sources", self.path)

    def take(self) -> T:
        if self._next is _END:
            self._begin()
        row, self._next = self._next, next(self._open, _END)
        self.taken += 1
        self.ended = self.ended or self._next is _END
        return row


def mixed(
    sources: Sequence[Any], rows: Sequence[Callable[[int], Iterator[T]]], stopping: str
) -> Iterator[tuple[int, T]]:
    """(which source, row) of one epoch. rows: of each source, its rows in its pass 0, 1, ...

    DataError: a source has no row."""
    heads = [_Source(source.path, make) for source, make in zip(sources, rows, strict=True)]
    weights = weights_of(sources)
    if weights is None:
        while not all(head.ended for head in heads):
            for i, head in enumerate(heads):
                if not head.ended:
                    yield i, head.take()
        return
    shares = [weight / sum(weights) for weight in weights]
    over = all if stopping == "all_exhausted" else any
    for turn in itertools.count(1):
        i = max(range(len(heads)), key=lambda k: shares[k] * turn - heads[k].taken)
        yield i, heads[i].take()
        if over(head.ended for head in heads):
            return
