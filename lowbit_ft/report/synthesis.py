"""The section of the report on data.synthesis: how many rows the model wrote, what was left out, some of
them."""

from __future__ import annotations

import json
from typing import Any

from .files import NotShown, RunFiles
from .html import escape, folded, is_number, plain, table, tiles

FOLDER = "synthesis"
SHOWN = 3  # rows of each part


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
            ("tokens", f"{tokens:,}"),
        ]
    )
    if reasons:
        html += table(["why rows were dropped", "rows"], [[k, f"{v:,}"] for k, v in reasons.items()])
    for part, title in (("train", "some rows that were trained on"), ("dropped", "some that were dropped")):
        name = next((n for s in shards for n in s.get("files") or {} if str(n).startswith(f"{part}/")), None)
        if name is not None:
            html += folded(title, "".join(f"<pre>{escape(text)}</pre>" for text in _texts(run, str(name))))
    return html


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
                else str(row.get("text"))
            )
            found.append(why + words)
    return found
