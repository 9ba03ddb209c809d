"""kind: self_generated. LLM-QAT's text: from a single token, the first ones greedy, the others drawn.

LLM-QAT (arXiv 2305.17888, section 3.1) lets the full-precision model write from every token of its
vocabulary: greedily up to 3, 4 or 5 tokens, then drawn from its distribution until it ends the text. The
greedy tokens make a likely beginning of an unlikely token, the draws make the rows differ.

Two things are not theirs. The tokenizer's BOS stands before the start, where it puts one before every text:
the model was trained so. And the row is stored as the tokens that were written: they decode and encode again,
which moves token boundaries.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Count
from .text import TextConfig
from .voice import Row, Rows, Voice


class SelfGeneratedConfig(TextConfig):
    kind: Literal["self_generated"] = "self_generated"
    samples: Count | None = Field(
        default=1024,
        description="rows to write, before the filter; null: one for every start and prefix length",
    )
    starts: Literal["all"] | Count = Field(
        default="all", description="first tokens: all of the vocabulary but special ones, or n of them"
    )
    deterministic_prefix: Annotated[list[Count], Field(min_length=1)] = Field(
        default=[3, 4, 5],
        description="tokens, the start among them, up to which the likeliest is taken; a row has one",
    )

    def problem(self, max_len: int) -> tuple[str, str] | None:
        longest = max(self.deterministic_prefix)
        if longest < max_len:
            return super().problem(max_len)
        return "deterministic_prefix", f"got {longest} of rows of {max_len} tokens; nothing would be drawn"

    def most_rows(self, vocabulary: int) -> int:
        starts = vocabulary if self.starts == "all" else self.starts
        return self.samples or starts * len(self.deterministic_prefix)

    def rows(self, voice: Voice) -> Rows:
        return FromTokens(self, voice)


class FromTokens(Rows):
    """Pairs of a start and a prefix length in a seeded order; where more rows are wanted than there are
    pairs, the same ones again, drawn anew."""

    def __init__(self, config: SelfGeneratedConfig, voice: Voice):
        starts = [i for i in range(voice.size) if i not in voice.special]
        left_out = voice.size - len(starts)
        self.notes = [f"{len(starts):,} tokens to start from; {left_out:,} special tokens are left out"]
        order = random.Random(config.seed)
        if config.starts != "all":
            if config.starts > len(starts):
                raise ValueError(
                    f"data.synthesis.starts: got {config.starts}; the tokenizer has {len(starts)} tokens "
                    "that are not special; set starts: all"
                )
            starts = order.sample(starts, config.starts)
        self.pairs = [(start, length) for length in config.deterministic_prefix for start in starts]
        order.shuffle(self.pairs)
        self.count = len(self.pairs) if config.samples is None else config.samples
        if config.valid >= self.count:
            raise ValueError(
                f"data.synthesis.valid: got {config.valid} of {self.count} rows; leave some for training"
            )
        self.drawable, self.voice = voice.stops, voice

    def __getitem__(self, number: int) -> Row:
        start, length = self.pairs[number % len(self.pairs)]
        return Text(self.voice, start, length)


class Text(Row):
    def __init__(self, voice: Voice, start: int, greedy: int):
        super().__init__([*voice.before, start])
        self.voice, self.given = voice, len(self.ids)
        self.drawn_from = len(voice.before) + greedy

    def take(self, likeliest: int, drawn: int) -> bool:
        self.ids.append(likeliest if len(self.ids) < self.drawn_from else drawn)
        return self.ids[-1] not in self.voice.stops and len(self.ids) < self.voice.max_len

    def wrote(self) -> list[list[int]]:
        ids = self.ids[self.given :]
        return [ids[:-1] if ids[-1:] and ids[-1] in self.voice.stops else ids]

    def facts(self) -> dict[str, Any]:
        return {"text": self.voice.text(self.ids)}
