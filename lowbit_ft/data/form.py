"""form: what a plan can say of the rows without a tokenizer: whether files can be rows of their format.

A whole pass over the local files of a source, if they are small: JSON, columns, and of chats the turns. What
only the tokenizer and the chat template know (lengths, words that the template drops) a run finds, and what
is wrong with a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..model.images import SUFFIXES
from .errors import BadRow, DataError
from .formats import FORMATS, told
from .read import READERS, read_rows
from .splits import find_files, saved_dataset

MOST_BYTES = 32 << 20  # of all files of a source: about a second


@dataclass(frozen=True)
class Form:
    """rows: read of the source, of which `bad` cannot be used; None: not read, and `why`."""

    rows: int | None = None
    bad: int = 0
    why: str = ""


def form_of(source: Any, on_bad_row: str) -> Form:
    """Read a source (a recipe's DataSource). DataError naming file and line, as a run would raise it."""
    files = None if saved_dataset(source.path) else find_files(source, READERS, [], SUFFIXES)
    if files is None:
        return Form(why=f"{source.path} is a data set of `datasets`")
    if any(file.suffix.lower() == ".parquet" for file in files):  # which imports a library
        return Form(why=f"{source.path} is parquet")
    read = [file for file in files if file.suffix.lower() not in SUFFIXES]  # of pictures only the names are
    if (size := sum(file.stat().st_size for file in read)) > MOST_BYTES:
        return Form(why=f"{source.path} has {size / 1e6:,.0f} MB")
    kind = FORMATS[source.format] if source.format is not None else None  # None: the task names its columns
    rows = bad = 0
    for row in read_rows(source):
        rows += 1
        try:
            if row.value is None:
                raise BadRow(row.problem)
            if kind is not None:
                kind.check(row.value)
        except BadRow as error:
            if on_bad_row != "skip":
                raise DataError(told(error), row.file, row.number) from error
            bad += 1
    if not rows:
        raise DataError("the data set is empty: it has no row", source.path)
    return Form(rows, bad)
