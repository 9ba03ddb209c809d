"""Rows of dense tables that train beside the adapters (model.add_tokens): of a run, not of its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import BaseModel, PrivateAttr


class TokenRows(BaseModel):
    """A config that also knows these rows. token_rows: module -> tokens; token_levels: how the rows of the
    last of them are made of vectors (model/rows.py), empty where each is its own."""

    _token_rows: dict[str, tuple[int, ...]] = PrivateAttr(default_factory=dict)
    _token_levels: tuple[int, ...] = PrivateAttr(default=())

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        return self._token_rows

    @property
    def token_levels(self) -> tuple[int, ...]:
        return self._token_levels

    def with_token_rows(self, rows: Mapping[str, Sequence[int]], levels: Sequence[int] = ()) -> Self:
        made = self.model_copy()
        made._token_rows = {name: tuple(ids) for name, ids in rows.items()}
        made._token_levels = tuple(levels)
        return made
