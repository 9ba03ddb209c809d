"""Which rows are trained on. A model that writes on and on drifts: it repeats itself, or leaves language.

    too short      it wrote fewer than min_tokens (a question of a chat: nothing)
    one token      a token stands more than max_run times in a row
    repetition     more than max_repetition of the n-grams stood in the row before
    no text        more than max_unreadable of the characters are control characters, or bytes of no character
    seen before    the same tokens as an earlier row

A row has one reason, the first that holds.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby

from pydantic import BaseModel, Field

from .base import CLOSED, Count, Share


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


def why_dropped(wrote: Sequence[Sequence[int]], text: str, wanted: FilterConfig) -> str | None:
    """The reason to leave a row out, None to train on it. wrote: the stretches that the model wrote; text:
    their words."""
    last = wrote[-1]
    if len(last) < wanted.min_tokens or not all(wrote):
        return "too short"
    if any(longest_run(part) > wanted.max_run for part in wrote):
        return "one token"
    if any(repetition(part, wanted.ngram) > wanted.max_repetition for part in wrote):
        return "repetition"
    if not text.strip() or unreadable(text) > wanted.max_unreadable:
        return "no text"
    return None


def longest_run(ids: Sequence[int]) -> int:
    """How often the most repeated token stands in a row."""
    return max((sum(1 for _ in same) for _, same in groupby(ids)), default=0)


def repetition(ids: Sequence[int], n: int) -> float:
    """The share of the n-grams that stood in the row before; 0 where there is none."""
    count = len(ids) - n + 1
    return 1 - len({tuple(ids[i : i + n]) for i in range(count)}) / count if count > 0 else 0.0


def unreadable(text: str) -> float:
    """The share of characters that no text has: controls (but for line ends and tabs), private and unassigned
    ones, and U+FFFD, which bytes of no character decode to. Half a character at the end of a row is its cut,
    and does not count."""
    text = text.rstrip("\ufffd")
    bad = sum(
        c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\r\t") for c in text
    )
    return bad / max(1, len(text))
