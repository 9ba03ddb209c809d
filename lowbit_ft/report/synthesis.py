"""The section of the report on data.synthesis: how many rows the model wrote, what was left out, some of
them."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from ..files.regular import read_regular
from .files import NotShown, RunFiles
from .html import escape, folded, is_number, plain, png, table, tiles

FOLDER = "synthesis"
SHOWN = 3  # rows of each part
PICTURES, MOST_BYTES = 24, 1 << 20  # shown, and of one
PNG = b"\x89PNG\r\n\x1a\n"


def synthesis_section(run: RunFiles) -> str:
    facts = run.json(f"{FOLDER}/lowbit_ft.json", "The model wrote no rows", dict)
    shards = facts.get("shards")
    shards = [s for s in shards.values() if isinstance(s, dict)] if isinstance(shards, dict) else []
    if not shards:
        raise NotShown("The model wrote no rows (synthesis/lowbit_ft.json lists none).")
    rows, reasons = (_sums(shards, key) for key in ("rows", "reasons"))
    tokens = sum(int(s["tokens"]) for s in shards if is_number(s.get("tokens")))
    html = tiles(
        [
            ("written by the model", plain(facts.get("by"))),
            ("to train on", f"{rows.get('train', 0):,} rows"),
            ("for validation", f"{rows.get('valid', 0):,} rows"),
            ("dropped", f"{rows.get('dropped', 0):,} rows"),
            (plain(facts.get("unit", "tokens")), f"{tokens:,}"),
            *_scores(facts),
        ]
    )
    for warning in _list(facts.get("warnings")):
        html += f"<p><strong>{escape(str(warning))}</strong></p>"
    if reasons:
        html += table(["why rows were dropped", "rows"], [[k, f"{v:,}"] for k, v in reasons.items()])
    html += _counted(facts.get("answers"), "answers of the rows that were kept")
    html += _counted(facts.get("fates"), "what became of their answers")
    html += _pictures(run, shards)
    for part, title in (("train", "some rows that were trained on"), ("dropped", "some that were dropped")):
        name = next((name for name in _files(shards) if name.startswith(f"{part}/")), None)
        if name is not None:
            html += folded(title, "".join(f"<pre>{escape(text)}</pre>" for text in _texts(run, name)))
    return html


def _files(shards: list[dict[str, Any]]) -> list[str]:
    """The files of the shards, without those that lie in another folder than this."""
    listed = [shard["files"] for shard in shards if isinstance(shard.get("files"), dict)]
    inside = (name for files in listed for name in files if ".." not in PurePath(name).parts)
    return [name for name in inside if not PurePath(name).is_absolute()]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _scores(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The measures of the model on its own rows."""
    scores = facts.get("own_score")
    given = scores.items() if isinstance(scores, dict) else ()
    return [(f"{name}, by the model itself", f"{v:.3f}") for name, v in given if is_number(v)]


def _counted(counts: Any, title: str) -> str:
    """A histogram: words, rows, and a bar of their share."""
    if not isinstance(counts, dict) or not counts:
        return ""
    numbers = {str(k): int(v) for k, v in counts.items() if is_number(v) and v >= 0}
    total = sum(numbers.values()) or 1
    rows = [[k, f"{v:,}", "#" * round(40 * v / total)] for k, v in numbers.items()]
    return table([title, "rows", ""], rows)


def _pictures(run: RunFiles, shards: list[dict[str, Any]]) -> str:
    """Some of the images that the model made, as they are stored."""
    shown = []
    for name in [name for name in _files(shards) if name.endswith(".png")][:PICTURES]:
        try:
            data = read_regular(run.folder / FOLDER / name, MOST_BYTES)
        except (OSError, ValueError):
            continue  # it went away; the table says how many there were
        if data.startswith(PNG):
            shown.append(png(data, name))
    return "".join(shown) and f"<p>{' '.join(shown)}</p>"


def _sums(shards: list[dict[str, Any]], key: str) -> dict[str, int]:
    """The counts of all shards under this key, the largest first."""
    total: dict[str, int] = {}
    for shard in shards:
        counts = shard.get(key)
        for name, count in counts.items() if isinstance(counts, dict) else ():
            total[name] = total.get(name, 0) + (int(count) if is_number(count) else 0)
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _texts(run: RunFiles, name: str) -> list[str]:
    found = []
    for line in run.text(f"{FOLDER}/{name}", "No such rows").split("\n")[:SHOWN]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            why = f"[{row['dropped']}]\n" if "dropped" in row else ""
            turns = row.get("messages")
            words = (
                "\n".join(f"{t.get('role')}: {t.get('content')}" for t in turns if isinstance(t, dict))
                if isinstance(turns, list)
                else str(row.get("text") or json.dumps(row))
            )
            found.append(why + words)
    return found
