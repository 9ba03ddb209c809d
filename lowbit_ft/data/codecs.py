"""codecs: which speech codec made the codes in rows, as `lowbit-ft encode` writes into each (key `codec`).

A code is a number, and another codec means another sound by it; so rows of two codecs are refused, and what
the rows say ships in config.json, where `speak` compares it with the codec that it is given.
"""

from __future__ import annotations

from typing import Any

from ..speech.tokens import CODEC
from .errors import DataError, told
from .mix import sources_of
from .read import read_rows


def codec_of_rows(section: Any, *more: Any) -> str | None:
    """The digest that the rows of data.train, data.valid and `more` sources have; None where none says one.
    DataError naming file and row of one that is no text, or another than before. Rows that are streamed are
    not looked at, for there may be no end of them."""
    found: str | None = None
    for source in () if section.streaming else sources_of(section.train) + sources_of(section.valid):
        found = _same(source, found)
    for source in (one for given in more for one in sources_of(given)):
        found = _same(source, found)
    return found


def _same(source: Any, found: str | None) -> str | None:
    for row in read_rows(source):
        said = row.value.get(CODEC) if row.value is not None else None
        if said is None:  # text beside speech, and what others made
            continue
        if not isinstance(said, str) or found not in (None, said):
            wanted = "the digest of a codec" if found is None else f"{found[:16]}..., as the rows before"
            raise DataError(
                f"{CODEC!r}: got {told(said)}; allowed: {wanted}; encode all rows with one codec "
                "(lowbit-ft encode)",
                row.file,
                row.number,
            )
        found = said
    return found
