"""format: tokens. Rows {"input_ids"}, tokenized already; what is learned is `labels` where it is there, else
all.

A window that another program made, down to the token: nothing is added, no EOS either. train_on says nothing
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadRow, kind
from ..windows import IGNORE
from .base import Format, Tokens


class TokenIds(Format):
    columns = {
        "input_ids": "the row's tokens, as they are: nothing is added",
        "labels": "-100 where a token is not learned, else the token itself; without it all are learned",
    }

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        ids = _integers(row, "input_ids")
        if not ids:
            raise BadRow("'input_ids' is empty")
        if min(ids) < 0:
            raise BadRow(f"'input_ids' has {min(ids)}; tokens are numbers from 0 on")
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


def _integers(row: Mapping[str, Any], key: str) -> list[int]:
    if key not in row:
        keys = ", ".join(repr(k) for k in list(row)[:8]) or "none"
        raise BadRow(f"key {key!r} is missing; the row's keys are: {keys}")
    value = row[key]
    if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
        raise BadRow(f"{key!r} must be a list of integers; got {kind(value)}")
    return value
