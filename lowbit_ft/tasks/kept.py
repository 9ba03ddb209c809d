"""Kept: a file that a row names, or that a table on the disk has, and that is not held in memory: it is
checked when the row is read, and read again where a batch shows it. What a row holds itself (the bytes in a
parquet file) stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..data.errors import BadRow, DataError, kind
from ..data.read import Stored
from ..files.regular import read_regular
from .rows import place_of

PICTURE = 1 << 28  # bytes of the file of a picture, at most


@dataclass(frozen=True)
class Kept:
    """digest: sha256 of what was checked; place: for messages; read(limit): the bytes as they are now."""

    digest: str
    place: str
    read: Callable[[int], bytes] = field(compare=False)

    def data(self, limit: int) -> bytes:
        """DataError where it is no longer what it was."""
        try:
            found = self.read(limit)
        except Exception as error:  # what reads a table has kinds of its own
            why = getattr(error, "strerror", None) or error
            raise DataError(f"cannot be read any more: {why}", self.place) from error
        if hashlib.sha256(found).hexdigest() != self.digest:
            raise DataError("was changed while the run reads it; start the run anew", self.place)
        return found


def read_file(
    value: Any, column: str, folder: Path, limit: int, what: str = "the path of a file, or its bytes"
) -> tuple[bytes, Kept | bytes]:
    """The bytes of a file that a row names by a path (place_of) or holds itself, also as `datasets` has it
    ({bytes, path}), and what of it is held. what: the column must be this. BadRow naming the column."""
    again = value.again if isinstance(value, Stored) else None
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and again is not None:
        return value, _kept(value, f"{column!r} of the data set", lambda limit: again()["bytes"])
    if isinstance(value, bytes):
        return value, value
    if not isinstance(value, str | Path) or not value:
        raise BadRow(f"{column!r} must be {what}; got {kind(value)}")
    try:
        place = place_of(value, folder)
        data = read_regular(place, limit)
    except (OSError, ValueError, RuntimeError) as error:  # "~who" of nobody, a path with a zero byte
        why = getattr(error, "strerror", None) or error
        raise BadRow(f"{column!r}: {value} cannot be read: {why}") from error
    place = place.resolve()
    return data, _kept(data, str(place), partial(read_regular, place))


def _kept(data: bytes, place: str, read: Callable[[int], bytes]) -> Kept:
    return Kept(hashlib.sha256(data).hexdigest(), place, read)


def read_picture(value: Any, column: str, folder: Path) -> tuple[bytes, Kept | bytes]:
    """read_file of a picture."""
    return read_file(value, column, folder, PICTURE, "a picture, as datasets keeps it, or the path of one")


def kept_file(
    value: Any, column: str, folder: Path, limit: int, check: Callable[[bytes], Any]
) -> Kept | bytes:
    """What is held of a file (read_file) whose content `check` takes; its ValueError is a BadRow."""
    data, held = read_file(value, column, folder, limit)
    try:
        check(data)
    except ValueError as error:
        raise BadRow(f"{column!r}{f': {value}' if isinstance(held, Kept) else ''} {error}") from None
    return held


def data_of(value: Kept | bytes, limit: int = PICTURE) -> bytes:
    return value if isinstance(value, bytes) else value.data(limit)
