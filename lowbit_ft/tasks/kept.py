"""Kept: a file that a row names and that is too large to be held for every row: checked when the row is read,
and read again where a batch shows it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.errors import BadRow, DataError, kind
from ..files.regular import read_regular
from .rows import place_of


@dataclass(frozen=True)
class Kept:
    """digest: sha256 of what was checked."""

    place: Path
    digest: str

    def data(self, limit: int) -> bytes:
        """DataError where the file is no longer what it was."""
        try:
            found = read_regular(self.place, limit)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"cannot be read any more: {why}", str(self.place)) from error
        if hashlib.sha256(found).hexdigest() != self.digest:
            raise DataError("was changed while the run reads it; start the run anew", str(self.place))
        return found


def kept_file(
    value: Any, column: str, folder: Path, limit: int, check: Callable[[bytes], Any]
) -> Kept | bytes:
    """The file that a row names by a path (place_of), or its bytes where the row holds them. check(bytes)
    raises ValueError for content that is not what it should be. BadRow naming the column."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        place, data = None, value
    elif isinstance(value, str) and value:
        try:
            place = place_of(value, folder)
            data = read_regular(place, limit)
        except (OSError, ValueError, RuntimeError) as error:  # "~who" of nobody, a path with a zero byte
            why = getattr(error, "strerror", None) or error
            raise BadRow(f"{column!r}: {value} cannot be read: {why}") from error
    else:
        raise BadRow(f"{column!r} must be the path of a file, or its bytes; got {kind(value)}")
    try:
        check(data)
    except ValueError as error:
        raise BadRow(f"{column!r}{'' if place is None else f': {value}'} {error}") from None
    return data if place is None else Kept(place.resolve(), hashlib.sha256(data).hexdigest())


def data_of(value: Kept | bytes, limit: int) -> bytes:
    return value if isinstance(value, bytes) else value.data(limit)
