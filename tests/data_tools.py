"""What the tests of the data files share: loading with short arguments, and looking at windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from lowbit_ft.data.examples import load_examples
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.recipe.sections.data import DataSection

ASSETS = Path(__file__).parents[1] / "recipes" / "assets"
TINY = ASSETS / "tiny-llama"

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And  3+3?\n"},
    {"role": "assistant", "content": "It is six.\n\nOf course."},
]


def load(
    path: Any, tokenizer: Any, format: str = "chat", *, seed: int = 0, limit: int | None = None, **keys: Any
) -> Examples:
    keys = {"sequence_len": 64, "packing": False, **keys}
    source = {"path": str(path), "format": format, "limit": limit}
    section = DataSection.model_validate({"train": source, **keys})
    return load_examples(section.train, section, tokenizer, seed=seed)


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def targets(tokenizer: Any, example: Example) -> list[str]:
    """The learned text, one string per run of learned tokens."""
    runs: list[list[int]] = []
    previous = -100
    for label in example.labels:
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def parts(window: Example) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    assert sum(window.segments) == len(window.input_ids) == len(window.labels) and min(window.segments) > 0
    out, start = [], 0
    for length in window.segments:
        out.append(
            (tuple(window.input_ids[start : start + length]), tuple(window.labels[start : start + length]))
        )
        start += length
    return out
