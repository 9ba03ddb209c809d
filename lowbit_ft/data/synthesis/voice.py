"""Who writes text, and what a row is while it is written, token by token.

A kind says how a row begins and what follows; how the model is run, drawn from, filtered and written is the
same for all (write.py, draw.py, filters.py, text.py). A row is known by its number: it begins and is drawn
alike whatever rows are written beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


class Voice:
    """What a kind has to know of the model that writes: its tokenizer, the tokens that end an answer, and the
    tokens it has an embedding of; and of the rows: tokens at most. special: tokens that are no text; before:
    what the tokenizer puts before a text."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], max_len: int, embedded: int | None = None):
        self.tokenizer, self.max_len = tokenizer, max_len
        self.size = min(len(tokenizer), embedded or len(tokenizer))
        own = tokenizer.eos_token_id
        self.stops = frozenset(stops) | ({own} if own is not None else set())
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marked = {i for i, token in added.items() if getattr(token, "special", False)}
        self.special = frozenset({*tokenizer.all_special_ids, *marked})
        text = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.before = list(text[: len(text) - len(bare)]) if text[len(text) - len(bare) :] == bare else []

    def encode(self, text: str) -> list[int]:
        """A text that says itself which special tokens stand where."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def text(self, ids: Sequence[int]) -> str:
        """The tokens as text, special ones left out. Half a character at a cut becomes U+FFFD."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class Rows(ABC):
    """The rows of a kind, by number. count: how many there are. drawable: special tokens that may be drawn
    (no other one can). notes: what the user should know. answers, fates: as Maker tells them, of the
    rows that were remembered."""

    count: int
    drawable: frozenset[int]
    notes: Sequence[str] = ()
    answers: Counter[str] = Counter()
    fates: Counter[str] = Counter()

    @abstractmethod
    def __getitem__(self, number: int) -> Row:
        """Row `number`, not written yet. All rows begin with the same number of tokens."""

    def judge(self, model: Any, rows: Sequence[Row]) -> list[str | None]:
        """Written rows that the filter let through, shown to the model once more: why each is dropped, or
        None. What it says is the row's to keep."""
        return [None] * len(rows)

    def repeats(self, row: Mapping[str, Any]) -> bool:
        """Whether a row, as it is stored, says what a remembered one said, in other tokens."""
        return False

    def remember(self, row: Mapping[str, Any]) -> None:
        """A row, as it is stored, that is kept."""
        return None  # a kind whose rows have nothing in common has nothing to keep

    def warnings(self) -> list[str]:
        """As those of Maker."""
        return []


class Row(ABC):
    """One row while it is written. ids: its tokens so far, of which the first ones are given."""

    def __init__(self, ids: Sequence[int]):
        self.ids = list(ids)

    @abstractmethod
    def take(self, likeliest: int, drawn: int) -> bool:
        """Append the next token to `ids`: the likeliest one, the one that was drawn, or one that must stand
        there. Returns whether the row goes on."""

    @abstractmethod
    def wrote(self) -> list[list[int]]:
        """The stretches that the model wrote, without the tokens that end them: what the filter looks at."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What is stored beside the ids: `learned`, where not all are, and the text for people."""
