"""What makes a folder the folder of a run: started.json, which RunDir writes first and nobody else writes so.

A recipe.yaml alone is no mark: whoever keeps recipes has one.
"""

import json
from pathlib import Path

from .regular import read_regular

MARKER = "started.json"
WRITER = "lowbit_ft"


def is_run(folder: Path) -> bool:
    """Whether lowbit_ft made this folder for a run."""
    try:
        facts = json.loads(read_regular(folder / MARKER, 1 << 16).decode())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and facts.get("writer") == WRITER
