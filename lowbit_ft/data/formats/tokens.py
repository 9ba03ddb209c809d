"""format: tokens. Rows {"input_ids"}, tokenized already; what is learned is `labels` or `learned` where it is
there, else all.

A window that another program made, or that the model wrote itself (data.synthesis), down to the token: their
text, tokenized again, need not be these. Nothing is added, no EOS either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadRow, kind
from ..windows import IGNORE
from .base import Format, Tokens


class TokenIds(Format):
    told_by = (("input_ids",),)
    columns = {
        "input_ids": "the row's tokens, as they are: nothing is added",
        "labels": "-100 where a token is not learned, else the token itself; without it all are learned",
        "learned": "instead of labels, a list of `[start, end]`: these tokens are learned (`train_on: all`: "
        "all; `completion`: the last)",
        "row": "its number: not read",
        "about": "what a synthesis says of it: not read",
        "text": "the same for people: not read",
        "messages": "the same for people: not read",
    }

    def __init__(self, train_on: str, tokenizer: Any):
        super().__init__(train_on, tokenizer)
        self.notes = []  # about texts, to which an EOS is added

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        ids = _integers(row, "input_ids")
        if not ids:
            raise BadRow("'input_ids' is empty")
        if not 0 <= min(ids) <= max(ids) < 1 << 31:
            odd = next(token for token in ids if not 0 <= token < 1 << 31)
            raise BadRow(f"'input_ids' has {odd}; tokens are numbers from 0 on")
        if row.get("learned") is not None:
            if row.get("labels") is not None:
                raise BadRow("'labels' and 'learned' both say what is learned; give one of them")
            return Tokens(ids, self._spans(row["learned"], len(ids)))
        if row.get("labels") is None:
            return Tokens(ids, [True] * len(ids))
        labels = _integers(row, "labels")
        if len(labels) != len(ids):
            raise BadRow(f"'labels' has {len(labels)} numbers and 'input_ids' {len(ids)}; one for each token")
        for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (token, IGNORE):
                raise BadRow(
                    f"'labels' has {label} at {place}, where 'input_ids' has {token}; allowed: {token} "
                    f"or {IGNORE}"
                )
        return Tokens(ids, [label != IGNORE for label in labels])

    def _spans(self, spans: Any, length: int) -> list[bool]:
        if not isinstance(spans, list) or not all(_is_span(span, length) for span in spans):
            raise BadRow(f"'learned' must be a list of [start, end] within the {length} input_ids")
        if self.train_on == "all":
            return [True] * length
        learned = [False] * length
        for start, end in spans[-1:] if self.train_on == "completion" else spans:
            learned[start:end] = [True] * (end - start)
        return learned


def _is_span(span: Any, length: int) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 2
        and all(type(border) is int for border in span)
        and 0 <= span[0] <= span[1] <= length
    )


def _integers(row: Mapping[str, Any], key: str) -> list[int]:
    if key not in row:
        keys = ", ".join(repr(k) for k in list(row)[:8]) or "none"
        raise BadRow(f"key {key!r} is missing; the row's keys are: {keys}")
    value = row[key]
    if not isinstance(value, list):
        raise BadRow(f"{key!r} must be a list of integers; got {kind(value)}")
    for place, number in enumerate(value):
        if type(number) is not int:
            raise BadRow(f"{key}[{place}] must be an integer; got {number!r}")
    return value
