"""The rotations of the report page: what base/rotation.json says was turned where, and the errors that chose
it.
"""

from __future__ import annotations

from typing import Any

from .files import NotShown, RunFiles
from .html import folded, image, is_number, note, number, plain, table

FOLDER = "base/rotation.json"
SITES = ("r2", "r3", "r4")


def rotation_section(run: RunFiles) -> str:
    """Where, in words; of kind adaptive a picture of the errors and a line per layer and site. NotShown when
    nothing was turned or smoothed."""
    facts = run.json(FOLDER, "Nothing was rotated or smoothed", dict)
    turned = ["r1 (residual stream)"] if facts.get("r1") is True else []
    for site in SITES:
        layers = facts.get(site)
        if isinstance(layers, list) and any(on is True for on in layers):
            turned.append(f"{site} in {sum(on is True for on in layers)} of {len(layers)} layers")
    html = note(f"Turned: {', '.join(turned) or 'nothing'}; signs from seed {plain(facts.get('seed'))}.")
    errors = facts.get("errors")
    rows = [row for row in errors if isinstance(row, dict)] if isinstance(errors, list) else []
    if rows:
        html += _chosen(rows, str(facts.get("criterion")))
    alphas = facts.get("alphas")
    if isinstance(alphas, dict) and alphas:
        lines = [[norm, number(alpha, 2)] for norm, alpha in alphas.items()]
        html += note(f"Smoothed behind {len(lines)} norms.")
        html += folded("alpha of every norm", table(["norm", "alpha"], lines))
    if not turned and not rows and not alphas:
        raise NotShown("Nothing was rotated or smoothed.")
    return html


def _chosen(rows: list[dict[str, Any]], criterion: str) -> str:
    from . import plots as report_plots  # slow: matplotlib, and only pictures need it

    panels = []
    for end, title in (("off", "as it is (%)"), ("on", "turned (%)")):
        found = {f"layers.{row.get('layer')}.{row.get('site')}": _error(row, end) for row in rows}
        errors = {name: value for name, value in found.items() if value is not None}
        if errors:
            panels.append((f"relative squared error, {title}", errors, True))
    html = (
        image(report_plots.layers(panels), "error of each site in each layer, off and on") if panels else ""
    )
    html += note(f"A site is turned in the layers where that lowers the error (criterion: {criterion}).")
    keys = ("weight_off", "weight_on", "activation_off", "activation_on")
    lines = [
        [
            f"{plain(row.get('layer'))} {plain(row.get('site'))}",
            "turned" if row.get("on") is True else "as it is",
            *(number(row.get(key), 5) for key in keys),
        ]
        for row in rows
    ]
    head = ["layer, site", "chosen", "weight", "weight turned", "activation", "activation turned"]
    return html + folded("errors of every site", table(head, lines, words=2))


def _error(row: dict[str, Any], end: str) -> float | None:
    """Weight and activation together, of what was measured."""
    parts = [row.get(f"{kind}_{end}") for kind in ("weight", "activation")]
    numbers = [float(part) for part in parts if is_number(part)]
    return sum(numbers) if numbers else None
