"""Formats of rows: data.*.format. FORMATS is the list: what each makes of a row.

To add one: a subclass of Format in its own file (`columns`: what it reads of a row; `__call__`: a row ->
Tokens, most often by `whole`, `prompted` or `mark`) and one line in FORMATS.
"""

from typing import Any

from ..errors import BadRow, DataError, MissingKey
from .alpaca import Alpaca
from .base import Format, Tokens
from .chat import Chat
from .completion import Completion
from .preference import ANSWERS, Chosen, Preference
from .text import Text
from .tokens import TokenIds

FORMATS: dict[str, type[Format]] = {
    "chat": Chat,
    "completion": Completion,
    "alpaca": Alpaca,
    "text": Text,
    "tokens": TokenIds,
    "preference": Preference,
    "chosen": Chosen,
}


def format_of(name: str, train_on: str, tokenizer: Any) -> Format:
    """The format of that name for this tokenizer. DataError for an unknown one, or one it cannot do."""
    if name not in FORMATS:
        raise DataError(f"data format {name!r}; allowed: {', '.join(FORMATS)}")
    return FORMATS[name](train_on, tokenizer)


def told(error: BadRow) -> str:
    """What is wrong with a row; of keys that are missing also which format fits those it has."""
    if not isinstance(error, MissingKey):
        return str(error)
    wanted = {
        name: [set(columns) for columns in kind.told_by or ((ANSWERS,) if kind.pairs else ())]
        for name, kind in FORMATS.items()
        if name != "chosen"  # of the rows of preference
    }
    if fits := [name for name, sets in wanted.items() if any(s <= error.keys for s in sets)]:
        return f"{error}; these are of format: {' or '.join(fits)}"
    near = [(len(s & error.keys), name, s) for name, sets in wanted.items() for s in sets if s & error.keys]
    if not near:
        return f"{error}; docs/data.md has the keys of every format"
    _, name, columns = max(near, key=lambda found: found[0])
    lacks = " and ".join(repr(key) for key in sorted(columns - error.keys))
    return f"{error}; the nearest is format: {name}, which needs {lacks} too: rename a key to it"


__all__ = ["FORMATS", "Format", "Tokens", "format_of", "told"]
