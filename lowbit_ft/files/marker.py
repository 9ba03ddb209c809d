"""What makes a folder the folder of a run: started.json, which RunDir writes first and nobody else writes so.

A recipe.yaml alone is no mark: whoever keeps recipes has one.
"""

from pathlib import Path
from typing import Any

from .jsonfile import read_json

MARKER = "started.json"
WRITER = "lowbit_ft"


def is_run(folder: Path) -> bool:
    """Whether lowbit_ft made this folder for a run."""
    try:
        return read_json(folder / MARKER, dict[str, Any]).get("writer") == WRITER
    except ValueError:
        return False
