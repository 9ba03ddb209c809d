"""What the stages left in a run directory, read for the report.

A run may have been stopped, killed or resumed, so any file can be missing, cut or odd. Each reader returns
what can be trusted or raises NotShown with the reason, in words for the page; nothing else comes out of here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..files.jsonfile import parse_json, read_json
from ..files.regular import read_regular
from ..files.shallow_yaml import plain_data
from .html import is_number

# stage in evaluation.json -> its name on the page, in the order of the line
STAGES = {
    "base": "full precision",
    "quantized": "quantized, not trained",
    "trained": "trained",
    "merged": "merged",
    "exported": "exported and reloaded",
}
SHIPPED = ("trained", "merged", "exported")  # the three stages that must agree
MAX_TEXT = 1 << 30  # bytes of a file of a run; metrics.jsonl of a million steps has a fifth of it
DIGITS = 4  # of a perplexity, as printed; the verdict compares what is printed


class NotShown(Exception):
    """Why a section has nothing to show: its text goes where the section would have been."""


class RunFiles:
    """The files of one run directory."""

    def __init__(self, folder: Path):
        self.folder = folder

    def text(self, name: str, missing: str) -> str:
        """A whole text file. `missing` says what its absence means."""
        try:
            return read_regular(self.folder / name, MAX_TEXT).decode()
        except FileNotFoundError:
            raise NotShown(f"{missing} ({name} is not in the run directory).") from None
        except (OSError, ValueError) as error:
            raise NotShown(f"{name} cannot be read: {error}") from None

    def json(self, name: str, missing: str, kind: type) -> Any:
        """The content of a JSON file, which must be of this kind (list or dict; object for any)."""
        if not os.path.lexists(self.folder / name):
            raise NotShown(f"{missing} ({name} is not in the run directory).")
        try:
            value = read_json(self.folder / name)
        except ValueError as error:
            raise NotShown(f"{name} is not valid JSON: {error}") from None
        if not isinstance(value, kind):
            raise NotShown(f"{name} holds a {type(value).__name__}, not a {kind.__name__}.")
        return value

    def rows(self, name: str, missing: str) -> list[dict[str, Any]]:
        """A JSON list of objects; entries of another kind are left out."""
        rows = [row for row in self.json(name, missing, list) if isinstance(row, dict)]
        if not rows:
            raise NotShown(f"{missing} ({name} is empty).")
        return rows

    def recipe(self) -> dict[str, Any]:
        """recipe.yaml as plain data, {} where there is none: only the headings come from it."""
        try:
            data = plain_data(self.text("recipe.yaml", ""))
        except (NotShown, yaml.YAMLError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def asked(self, key: str, name: str) -> bool:
        """Whether there is anything to say of the file that eval.<key> leaves: it is there, or the recipe
        asked for it. A recipe that does not name the key may have asked."""
        section = self.recipe().get("eval")
        wanted = section.get(key, True) if isinstance(section, dict) else True
        return wanted not in (False, None, []) or (self.folder / name).exists()

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have a step. A killed run may leave half a line: it is left out."""
        rows = []
        for line in self.text("metrics.jsonl", "Training did not run").splitlines():
            try:
                row = parse_json(line.encode(), "metrics.jsonl", dict[str, Any])
            except ValueError:
                continue
            if is_number(row.get("step")) and isinstance(row["step"], int):
                rows.append(row)
        if not rows:
            raise NotShown("Training wrote no metrics (metrics.jsonl has no complete line).")
        return rows

    def evaluation(self) -> dict[str, dict[str, Any]]:
        """Stage -> its row of evaluation.json, in the order of STAGES, unknown stages last."""
        rows = self.json("evaluation.json", "Evaluation did not run", dict).get("rows")
        found: dict[str, dict[str, Any]] = {}
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict) and isinstance(row.get("stage"), str):
                found[row["stage"]] = row
        if not found:
            raise NotShown("Evaluation gave no rows (evaluation.json is empty).")
        return {stage: found[stage] for stage in [*STAGES, *found] if stage in found}


def values(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    """The numbers under this key, in order; rows without one are left out."""
    return [float(row[key]) for row in rows if is_number(row.get(key))]


def points(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows with this number; a resumed run repeats steps, and the later line counts."""
    return sorted({int(row["step"]): float(row[key]) for row in rows if is_number(row.get(key))}.items())
