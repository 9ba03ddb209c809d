"""What makes a folder the folder of a run: started.json, which RunDir writes first and nobody else writes so.

A recipe.yaml alone is no mark: whoever keeps recipes has one.
"""

import json
from pathlib import Path

MARKER = "started.json"
WRITER = "lowbit_ft"


def is_run(folder: Path) -> bool:
    """Whether lowbit_ft made this folder for a run."""
    try:
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and facts.get("writer") == WRITER
