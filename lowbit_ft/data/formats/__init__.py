"""Formats of rows: data.*.format. FORMATS is the list: what each makes of a row.

To add one: a subclass of Format in its own file (`columns`: what it reads of a row; `__call__`: a row ->
Tokens, most often by `whole`, `prompted` or `mark`) and one line in FORMATS.
"""

from typing import Any

from ..errors import DataError
from .alpaca import Alpaca
from .base import Format, Tokens
from .chat import Chat
from .completion import Completion
from .preference import Chosen, Preference
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


__all__ = ["FORMATS", "Format", "Tokens", "format_of"]
