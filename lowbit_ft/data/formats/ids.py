"""format: ids. Rows {"ids"} of token ids, as they are: nothing is tokenized, and no token is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadRow, kind
from .base import Format, Tokens


class Ids(Format):
    """What data.synthesis writes: the very tokens that a model wrote, which their text, tokenized again, need
    not be."""

    columns = {
        "ids": "tokens of this model's tokenizer, learned as they are; no EOS is added",
        "learned": "a list of `[start, end]`: only these tokens are learned, unless `train_on: all`",
        "row": "its number: not read",
        "text": "the same for people: not read",
        "messages": "the same for people: not read",
    }

    def __init__(self, train_on: str, tokenizer: Any):
        super().__init__(train_on, tokenizer)
        self.notes = []  # about texts, to which an EOS is added

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        ids = row.get("ids")
        if not isinstance(ids, list) or not ids:
            raise BadRow(
                f"'ids' must be a list of token ids; got {kind(ids)}{' without any' if ids == [] else ''}"
            )
        for i, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < 1 << 31:
                raise BadRow(f"ids[{i}] must be a token id; got {token!r}")
        spans = row.get("learned")
        if spans is None or self.train_on == "all":
            return Tokens(ids, [True] * len(ids))
        if not isinstance(spans, list) or not all(_is_span(span, len(ids)) for span in spans):
            raise BadRow(f"'learned' must be a list of [start, end] within the {len(ids)} ids")
        learned = [False] * len(ids)
        for start, end in spans[-1:] if self.train_on == "completion" else spans:
            learned[start:end] = [True] * (end - start)
        return Tokens(ids, learned)


def _is_span(span: Any, length: int) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 2
        and all(type(border) is int for border in span)
        and 0 <= span[0] <= span[1] <= length
    )
