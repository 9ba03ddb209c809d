"""format: text. Rows {"text"}, learned whole; packed, they are joined with EOS and cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Format, Tokens, string


class Text(Format):
    told_by = (("text",),)
    columns = {"text": "learned, with the EOS token"}
    joined = True

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        return self.whole(string(row, "text", filled=True))
