"""The contract of data.synthesis: the keys that all kinds share, and what a row is while it is written.

A kind says how a row begins and what follows; how the model is run, drawn from, filtered and written is the
same for all (write.py, draw.py, filters.py, folder.py). A row is known by its number: it begins and is drawn
alike whatever rows are written beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

CLOSED = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FilterConfig(BaseModel):
    """What a row must be, to be trained on. What is left out is counted, by its reason, and kept aside."""

    model_config = CLOSED

    min_tokens: Count = Field(default=16, description="tokens that the model wrote, at least")
    ngram: Count = Field(default=4, description="tokens of the n-grams that repetition counts")
    max_repetition: Share = Field(
        default=0.5, description="share of the n-grams of a row that stood in it before, at most"
    )
    max_run: Count = Field(default=16, description="one token so often in a row, at most")
    max_unreadable: Share = Field(
        default=0.1, description="share of characters that are no text (control, not decodable), at most"
    )


class SynthesisConfig(BaseModel):
    """The `data.synthesis` section of a recipe. Subclasses add their own keys; unknown keys are refused."""

    model_config = CLOSED

    needs_template: ClassVar[bool] = False  # the tokenizer's chat template

    kind: str
    samples: Count | None = Field(default=1024, description="rows to write, before the filter")
    valid: Annotated[int, Field(ge=0)] = Field(
        default=0, description="of these, rows for validation (data.valid is then left out)"
    )
    max_len: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="tokens of a row, at most; null: data.sequence_len"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="of what is drawn: the model's own distribution at 1"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="draw among the likeliest tokens of this share; null: among all"
    )
    filter: FilterConfig = Field(default_factory=FilterConfig, description="which rows are trained on")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(default=0, description="of starts and draws")
    batch_size: Count = Field(
        default=32, description="rows written at once, and the unit that a stopped run goes on from"
    )
    by: Literal["auto", "dense", "packed"] = Field(
        default="auto",
        description="the model that writes: dense as it is, or packed to 8 bits; auto: dense where it fits",
    )

    @model_validator(mode="after")
    def _rows_for_training(self) -> SynthesisConfig:
        if self.samples is not None and self.valid >= self.samples:
            raise ValueError(
                f"valid {self.valid} of samples {self.samples}; leave rows for training: raise samples"
            )
        return self

    def problem(self, max_len: int) -> tuple[str, str] | None:
        """(key, what is wrong with it and the way out) where the keys do not go together, for rows of
        max_len tokens; else None."""
        least = self.filter.min_tokens
        if least < max_len:
            return None
        return (
            "filter",
            f"got min_tokens {least} of rows of {max_len} tokens, so none would be left; lower it",
        )

    def most_rows(self, vocabulary: int) -> int:
        """Rows at most, for a model of so many tokens."""
        return self.samples or 0

    def rows(self, voice: Voice) -> Rows:
        """The rows of this kind for a model and its tokenizer. ValueError where they cannot be written."""
        raise AssertionError(f"{type(self).__name__} writes no rows")


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
    (no other one can). notes: what the user should know."""

    count: int
    drawable: frozenset[int]
    notes: Sequence[str] = ()

    @abstractmethod
    def __getitem__(self, number: int) -> Row:
        """Row `number`, not written yet. All rows begin with the same number of tokens."""


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
