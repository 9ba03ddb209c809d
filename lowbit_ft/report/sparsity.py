"""What the report says of quant.sparsity: the zeros that quant.json counts, and in zeros.json those that came
while the model trained."""

from typing import Any

from .files import NotShown, RunFiles
from .html import is_number, number


def zeros_notes(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence, of the rows of quant.json whose weights are locked at zero; none where no row is."""
    locked = [row for row in rows if is_number(row.get("zeros"))]
    if not locked:
        return []
    zeros = sum(row["zeros"] for row in locked)
    weights = sum(row["parameters"] for row in locked if is_number(row.get("parameters")))
    share = f", {100 * zeros / weights:.1f} % of them" if weights else ""
    return [
        f"{number(zeros)} weights of {len(locked)} layers are zero in every stage{share} (quant.sparsity)."
    ]


def grown_notes(run: RunFiles) -> list[str]:
    """A sentence of the weights that were pruned while the model trained; none where none were."""
    try:
        share, layers = map(run.json("zeros.json", "Nothing was pruned", dict).get, ("zeros", "layers"))
    except NotShown:
        return []
    if not is_number(share) or not isinstance(layers, dict):
        return []
    return [f"{100 * share:.1f} % of the weights of {len(layers)} layers became zero while it trained."]
