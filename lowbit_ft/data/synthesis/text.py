"""What the kinds share whose rows are tokens: their keys, and Pages, who makes such rows.

    rows of a shard -> written together (write.py) -> filtered (filters.py) -> judged by the kind -> stored

A row that repeats an earlier one is dropped: the same tokens, or what the kind takes for the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from ...model.config import head_width
from .base import Given, Maker, Shard, SynthesisConfig, Tell
from .filters import FilterConfig, why_dropped
from .voice import Row, Rows, Voice
from .write import write_rows

SEEN = "seen before"
ROW_BYTES = 11  # of synthesis/ per token, at most: its number with comma and blank, and its text


class TextConfig(SynthesisConfig):
    """The keys of a kind whose rows are tokens."""

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
    by: Literal["auto", "dense", "packed"] = Field(
        default="auto",
        description="the model that writes: dense as it is, or packed to 8 bits; auto: dense where it fits",
    )

    @property
    def writer(self) -> str:
        return self.by

    def longest(self, sequence_len: int) -> int:
        return self.max_len or sequence_len

    def problem(self, longest: int) -> tuple[str, str] | None:
        least = self.filter.min_tokens
        if least < longest:
            return None
        return (
            "filter",
            f"got min_tokens {least} of rows of {longest} tokens, so none would be left; lower it",
        )

    def most_rows(self, vocabulary: int) -> int:
        """Rows at most, for a model of so many tokens."""
        return self.samples or 0

    def working_bytes(self, weights: int, model: Any, size: int, longest: int) -> int:
        """The keys and values of a batch at its end, twice for a layer at a time (they grow by copies, which
        the allocator keeps), and the distribution of a step in fp32 and 64 bits."""
        text = model.get_text_config()
        cache = cache_bytes(text, size) * self.batch_size * longest
        step = self.batch_size * getattr(text, "vocab_size", 0) * (size + 2 * 4 + 3 * 8)
        return round(1.15 * weights) + 2 * cache + step

    def disk_bytes(self, model: Any, longest: int) -> int:
        return self.most_rows(getattr(model.get_text_config(), "vocab_size", 0)) * longest * ROW_BYTES

    @property
    def loosen(self) -> str:
        return (
            "loosen data.synthesis.filter, or change the temperature: lower against text that is none, "
            "higher against repetition"
        )

    def maker(self, given: Given) -> Maker:
        voice = Voice(given.tokenizer, given.stops, given.longest, given.rows)
        return Pages(self, self.rows(voice), voice)

    def rows(self, voice: Voice) -> Rows:
        """The rows of this kind for a model and its tokenizer. ValueError where they cannot be written."""
        raise AssertionError(f"{type(self).__name__} writes no rows")


class Pages(Maker):
    """Makes the rows of a TextConfig. seen: names of the rows that were kept."""

    def __init__(self, config: TextConfig, rows: Rows, voice: Voice):
        self.config, self.rows, self.voice = config, rows, voice
        self.count, self.longest, self.notes = rows.count, voice.max_len, rows.notes
        self.seen = set[str]()

    def write(self, numbers: range, model: Any, tell: Tell) -> Shard:
        config = self.config
        batch = [self.rows[number] for number in numbers]
        write_rows(
            model,
            batch,
            numbers,
            seed=config.seed,
            max_len=self.voice.max_len,
            temperature=config.temperature,
            top_p=config.top_p,
            drawable=self._drawable,
            tell=lambda tokens: tell(0, tokens),
        )
        shard = Shard(sum(len(row.ids) for row in batch))
        reasons = [self._filtered(row) for row in batch]
        good = [row for row, reason in zip(batch, reasons, strict=True) if reason is None]
        judged = dict(zip(map(id, good), self.rows.judge(model, good), strict=True))
        for number, row, reason in zip(numbers, batch, reasons, strict=True):
            reason = reason or judged[id(row)]
            stored = {"row": number, "input_ids": row.ids, **row.facts()}
            if reason is None and (row_name(row.ids) in self.seen or self.rows.repeats(stored)):
                reason = SEEN
            if reason is not None:
                shard.lines["dropped"].append({**stored, "dropped": reason})
                continue
            self.remember(stored)
            shard.lines["valid" if number < config.valid else "train"].append(stored)
        return shard

    def _drawable(self, vocabulary: int) -> torch.Tensor:
        voice, drawable = self.voice, self.rows.drawable
        return torch.tensor(
            [i < voice.size and (i not in voice.special or i in drawable) for i in range(vocabulary)]
        )

    def _filtered(self, row: Row) -> str | None:
        wrote = row.wrote()
        return why_dropped(wrote, "".join(self.voice.text(part) for part in wrote), self.config.filter)

    def remember(self, row: Mapping[str, Any]) -> None:
        self.seen.add(row_name(row["input_ids"]))
        self.rows.remember(row)

    @property
    def answers(self) -> Counter[str]:
        return self.rows.answers

    @property
    def fates(self) -> Counter[str]:
        return self.rows.fates

    def warnings(self) -> list[str]:
        return self.rows.warnings()


def cache_bytes(config: Any, size: int) -> int:
    """Bytes of the keys and values of one token, of `size` bytes each; too many where a model keeps less
    (windows, latent keys)."""

    def number(*names: str) -> int:
        return next((v for v in (getattr(config, name, None) for name in names) if isinstance(v, int)), 0)

    heads = number("num_attention_heads", "n_head") or 1
    width = head_width(lambda key: getattr(config, key, None)) or number("hidden_size")
    return (
        2 * number("num_hidden_layers", "n_layer") * (number("num_key_value_heads") or heads) * width * size
    )


def row_name(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()
