"""Table and plot of a results file of train_bench.py: what was measured, against what was promised, and what
was not measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = ("tokens_per_s", "ratio", "peak_gb", "predicted_gb")
HEADS = {
    "tokens_per_s": "tokens/s",
    "ratio": "step / QLoRA's",
    "peak_gb": "peak GB",
    "predicted_gb": "plan said",
}


def write_report(results: Path) -> str:
    """Writes <results>.md and <results>.png beside the file; returns the text of the table."""
    data = json.loads(results.read_text(encoding="utf-8"))
    environment = data["environment"]
    lines = [f"# Training step on {environment.get('gpu') or environment.get('machine')}", ""]
    lines += ["", *(f"- {key}: {value}" for key, value in environment.items()), ""]
    for stage in dict.fromkeys(row["stage"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["stage"] == stage]
        lines += [f"## {stage}", "", *table(rows), ""]
    text = "\n".join(lines)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(data["rows"], results.with_suffix(".png"))
    return text


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a row per case; an empty cell was not measured."""
    columns = [c for c in (*COLUMNS, "loss_error", "gradient_error") if any(c in row for row in rows)]
    out = [f"| case | {' | '.join(HEADS.get(c, c.replace('_', ' ')) for c in columns)} | target | |"]
    out.append("|---" + "|--:" * len(columns) + "|---|---|")
    for row in rows:
        cells = [
            "" if row.get(c) is None else f"{row[c]:.3g}" if c != "tokens_per_s" else f"{row[c]:.0f}"
            for c in columns
        ]
        target = (
            f"{HEADS.get(row['target'][0], row['target'][0])} <= {row['target'][1]:g}"
            if row.get("target")
            else ""
        )
        verdict = {True: "met", False: "MISSED", None: ""}[row.get("met")]
        if "skipped" in row:
            verdict = f"not measured: {row['skipped']}"
        out.append(f"| {row['name']} | {' | '.join(cells)} | {target} | {verdict} |")
    return out


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Tokens/s over peak memory of the contenders of the speed stage."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", flush=True)
        return
    points = [row for row in rows if row["stage"] == "speed" and "tokens_per_s" in row]
    if not points:
        return
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for row in points:
        ours = row["case"]["base"] == "packed"
        axes.scatter(row["peak_gb"], row["tokens_per_s"], color="tab:blue" if ours else "tab:orange")
        axes.annotate(
            row["name"],
            (row["peak_gb"], row["tokens_per_s"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(
        xlabel="peak memory of one step (GB)",
        ylabel="tokens/s",
        title="8B, 1 x 2048, rank 16, checkpointing on",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
