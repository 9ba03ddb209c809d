"""What the report says of quant.sparsity: the zeros that quant.json counts."""

from typing import Any

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
