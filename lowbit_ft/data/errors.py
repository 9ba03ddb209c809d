"""What is raised where a data set, or one row of it, cannot be used, and the words its messages are made
of."""

from __future__ import annotations

from collections.abc import Iterable


class DataError(ValueError):
    """A data set cannot be used. `str(error)` opens with `file:row:` where a row is to blame.

    Attributes: file (str | None), row (int | None: line or index from 1), problem (str).
    """

    def __init__(self, problem: str, file: str | None = None, row: int | None = None):
        where = "" if file is None else f"{file}: " if row is None else f"{file}:{row}: "
        super().__init__(where + problem)
        self.problem, self.file, self.row = problem, file, row


class BadRow(ValueError):
    """A row cannot become an example; the text says which key and why, the caller adds file and row."""


class MissingKey(BadRow):
    """A row lacks a key that its format reads. keys: those it has, by which another format may fit."""

    def __init__(self, wanted: str, row: Iterable[object]):
        self.keys = frozenset(map(str, row))
        listed = ", ".join(repr(key) for key in list(row)[:8]) or "none"
        super().__init__(f"key {wanted} is missing; the row's keys are: {listed}")


def kind(value: object) -> str:
    """What JSON calls the type of `value`, for messages."""
    names = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def told(value: object) -> str:
    """A value of a row where its kind alone would not say what is wrong with it: a number or a short text as
    it is."""
    if isinstance(value, float) and value != value:
        return "NaN"
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
    return kind(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, 200 characters at most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
