"""The tables of benchmarks/results/peers.json: every contender on every grid, and pairs at equal processor
time.

    python -m benchmarks.peers_table    # writes them: README.md, <!-- quality -->, and docs/, <!-- pairs -->

A cell is the mean over seeds, with the spread (sample standard deviation) where there are several, and in
brackets the mean processor seconds of the work. An empty cell was not measured. `make docs` runs it;
tests/docs/test_readme.py fails while the page says something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lowbit_ft.files.atomic import write_text

HERE = Path(__file__).resolve().parent
RESULTS, ROOT = HERE / "results" / "peers.json", HERE.parent
# block -> the page it stands on
PAGES = {"quality": ROOT / "README.md", "pairs": ROOT / "docs" / "choosing-a-method.md"}
SLACK = 1.05  # equal processor time: at most this times the peer's

Row = Mapping[str, Any]


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("model", "contender", "bits", "group_size", "symmetric", "seed"))


def grid_key(row: Row) -> tuple[int, int, bool]:
    """Wide grids first, symmetric before asymmetric."""
    return -row["bits"], row["group_size"], not row["symmetric"]


def grid_name(key: tuple[int, int, bool]) -> str:
    bits, group, asymmetric = key
    return f"W{-bits} {'rows' if group == -1 else f'g{group}'} {'asym' if asymmetric else 'sym'}"


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation where there are several."""
    found = list(values)
    return mean(found), stdev(found) if len(found) > 1 else None


def figure(values: Iterable[float]) -> str:
    middle, wide = spread(values)
    return f"{middle:.3f}" + ("" if wide is None else f" ±{wide:.3f}")


def cells(rows: Iterable[Row]) -> dict[str, dict[tuple[int, int, bool], list[Row]]]:
    """contender -> grid -> its rows, one per seed; contenders in the order of their first row."""
    out: dict[str, dict[tuple[int, int, bool], list[Row]]] = {}
    for row in rows:
        out.setdefault(row["contender"], {}).setdefault(grid_key(row), []).append(row)
    return out


def ours_last(found: Iterable[str], by_name: Mapping[str, Mapping[Any, list[Row]]]) -> list[str]:
    """Peers first, then ours, each in the order of the rows."""
    return sorted(found, key=lambda name: next(iter(by_name[name].values()))[0]["tool"]["tool"] == "ours")


def quality(rows: list[Row]) -> str:
    """Markdown: contenders x grids of one model, perplexity and processor seconds."""
    by_name = cells(rows)
    grids = sorted({grid_key(row) for row in rows})
    lines = ["| | " + " | ".join(map(grid_name, grids)) + " |", "|---|" + "--:|" * len(grids)]
    for name in ours_last(by_name, by_name):
        texts = []
        for grid in grids:
            mine = by_name[name].get(grid, [])
            seconds = f" ({mean(r['work_cpu_seconds'] for r in mine):.0f} s)" if mine else ""
            texts.append(figure(r["perplexity"] for r in mine) + seconds if mine else "")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def pairs(rows: list[Row]) -> str:
    """Markdown: for every peer and grid, the best of ours that took no more processor time, and the
    difference.

    "ahead" and "behind" are by more than both spreads together; anything nearer is "level". One seed has no
    spread: its verdict is the bare sign, with a question mark.
    """
    by_name = cells(rows)
    lines = ["| grid | peer | ours, in no more time | difference | |", "|---|---|---|--:|---|"]
    for name in by_name:
        for grid, theirs in sorted(by_name[name].items()):
            if theirs[0]["tool"]["tool"] == "ours":
                continue
            budget = SLACK * mean(r["work_cpu_seconds"] for r in theirs)
            fitting = {
                other: by_name[other][grid]
                for other in by_name
                if grid in by_name[other]
                and by_name[other][grid][0]["tool"]["tool"] == "ours"
                and mean(r["work_cpu_seconds"] for r in by_name[other][grid]) <= budget
            }
            head = f"| {grid_name(grid)} | {name} {told(theirs)} "
            if not fitting:
                lines.append(head + "| none | | |")
                continue
            best = min(fitting, key=lambda other: mean(r["perplexity"] for r in fitting[other]))
            off, verdict = compare(theirs, fitting[best])
            lines.append(head + f"| {best} {told(fitting[best])} | {off:+.3f} | {verdict} |")
    return "\n".join(lines)


def told(rows: list[Row]) -> str:
    return f"{figure(r['perplexity'] for r in rows)}, {mean(r['work_cpu_seconds'] for r in rows):.0f} s"


def compare(theirs: list[Row], ours: list[Row]) -> tuple[float, str]:
    """(our mean - theirs, the verdict); lower is better."""
    (their_mean, their_wide), (our_mean, our_wide) = (
        spread(r["perplexity"] for r in rows) for rows in (theirs, ours)
    )
    off = our_mean - their_mean
    word = "ahead" if off < 0 else "behind"
    if their_wide is None and our_wide is None:
        return off, f"{word}?"
    return off, word if abs(off) > (their_wide or 0) + (our_wide or 0) else "level"


def tables(stored: Mapping[str, Any]) -> dict[str, str]:
    """Block -> its text, model by model."""
    out: dict[str, list[str]] = {block: [] for block in PAGES}
    for name, facts in stored["models"].items():
        rows = [row for row in stored["rows"] if row["model"] == name and row["inputs"] == facts["inputs"]]
        if rows:
            title = f"{name}, full precision {facts['perplexity']:.3f} on {facts['tokens']:,} tokens"
            out["quality"] += [f"{title}:", quality(rows)]
            if any(row["tool"]["tool"] != "ours" for row in rows):
                out["pairs"] += [f"{name}:", pairs(rows)]
    return {block: "\n\n".join(texts) for block, texts in out.items()}


def render(block: str, page: str, stored: Mapping[str, Any]) -> str:
    """The page with its block made anew."""
    start, end = f"<!-- {block} -->\n", f"<!-- /{block} -->"
    head, found, rest = page.partition(start)
    _, closed, tail = rest.partition(end)
    assert found and closed, f"{PAGES[block].name} has no block {block}"
    return f"{head}{start}\n{tables(stored)[block]}\n\n{end}{tail}"


if __name__ == "__main__":
    for block, path in PAGES.items():
        stored = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_text(path, render(block, path.read_text(encoding="utf-8"), stored))
        print(f"wrote {path.name}")
