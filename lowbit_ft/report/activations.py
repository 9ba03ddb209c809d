"""The inputs of the report page: what activations.json says each layer's input is on, and why."""

from __future__ import annotations

from typing import Any

from .files import NotShown, RunFiles
from .html import folded, is_number, note, number, plain, table

FILE = "activations.json"
HEAD = ["layers", "kind", "bits", "why", "output error"]


def activations_section(run: RunFiles) -> str:
    """A line per kind, bits and reason in sight; a line per input, and what else was tried there, folded.
    NotShown when no input is quantized.
    """
    missing = "No input is on a grid"
    rows = run.json(FILE, missing, dict).get("rows")
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not found:
        raise NotShown(f"{missing} ({FILE} lists none).")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((*_grid(row), plain(row.get("why"))), []).append(row)
    short = []
    for (kind, bits, why), members in groups.items():
        names = list(dict.fromkeys(name.rpartition(".")[2] for row in members for name in _layers(row)))
        count = sum(len(_layers(row)) for row in members)
        errors = [float(row["error"]) for row in members if is_number(row.get("error"))]
        mean = number(sum(errors) / len(errors), 6) if errors else ""
        short.append([f"{count}: {', '.join(names)}", kind, bits, why, mean])
    text = "Mean squared error of the products that an input goes into, relative, on calibration rows."
    html = note(text) + table(HEAD, short, words=4)
    every = [
        [", ".join(_layers(r)), *_grid(r), plain(r.get("why")), number(r.get("error"), 6)] for r in found
    ]
    html += folded("every input", table(HEAD, every, words=4))
    tried = [(row, row["tried"]) for row in found if isinstance(row.get("tried"), dict)]
    lines = [
        [", ".join(_layers(row)), name, number(error, 6)]
        for row, errors in tried
        if len(errors) > 1
        for name, error in errors.items()
    ]
    if lines:
        html += folded("what else was tried", table(["layers", "scheme", "output error"], lines, words=2))
    return html


def _layers(row: dict[str, Any]) -> list[str]:
    layers = row.get("layers")
    return [name for name in layers if isinstance(name, str)] if isinstance(layers, list) else []


def _grid(row: dict[str, Any]) -> tuple[str, str]:
    """(kind, with what is unusual about it; bits)."""
    scheme = row.get("scheme")
    if not isinstance(scheme, dict):
        return "", ""
    kind = plain(scheme.get("kind"))
    kind += "" if scheme.get("group_size", -1) == -1 else f" of {plain(scheme['group_size'])}"
    words = [kind]
    words += ["with a zero point"] if scheme.get("symmetric") is False else []
    words += ["static"] if scheme.get("dynamic") is False else []
    words += ["learned"] if isinstance(scheme.get("learn"), str) else []
    words += [f"clip {plain(scheme['clip'])}"] if "clip" in scheme else []
    return ", ".join(words), plain(scheme.get("bits"))
