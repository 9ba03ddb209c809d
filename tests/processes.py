"""New processes in which this tree is the one that is imported."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(root: Path = ROOT, **more: str) -> dict[str, str]:
    """This process's variables with root's packages before all others, and `more`."""
    path = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | more
