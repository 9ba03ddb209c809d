"""A recipe in the making, and what another trainer's keys are to it: what the rules of a trainer fill in
and import_recipe.py writes down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Draft:
    """A recipe in the making. values: key of ours -> (value, what it came from). left: [(key of theirs,
    why)].
    """

    trainer: str
    theirs: dict[str, Any]
    folder: Path
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)

    def set(self, ours: str, value: Any, source: str) -> None:
        self.values[ours] = (value, source)

    def leave(self, key: str, why: str) -> None:
        self.left.append((key, why))

    def sources(self, ours: str) -> list[str]:
        """The keys that the sources of data.train or data.valid lie under: one, or one with a number each."""
        found = [key.removesuffix(".path") for key in self.values if key.endswith(".path")]
        return [key for key in found if key == ours or key.startswith(f"{ours}.")]

    def get(self, ours: str, default: Any = None) -> Any:
        return self.values[ours][0] if ours in self.values else default


Rule = Callable[[Draft, str, Any], None]


@dataclass(frozen=True)
class Trainer:
    """model_key tells its files; finish(draft) does what needs several keys at once."""

    name: str
    model_key: str
    rules: dict[str, Rule]
    finish: Callable[[Draft], None]
