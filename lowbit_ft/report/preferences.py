"""What a run that learned from pairs of answers says of them, as tiles of the training section."""

from __future__ import annotations

from typing import Any

from .files import values
from .html import number


def preference_facts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The last rewards of a run that learned from pairs, on the training and on the validation data."""
    facts = []
    for prefix, where in (("", ""), ("valid_", ", validation")):
        accuracies = values(rows, f"{prefix}rewards/accuracies")
        margins = values(rows, f"{prefix}rewards/margins")
        if accuracies and margins:
            facts.append((f"chosen answers preferred{where}", f"{100 * accuracies[-1]:.0f} %"))
            facts.append((f"reward margin{where}", number(margins[-1], 4)))
    return facts
