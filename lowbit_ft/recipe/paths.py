"""Paths in a recipe: what is there, what has a name near to it, and where a relative one is looked for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..model.chat_template import is_text
from ..names import did_you_mean
from ..signals import TEACHERS

# Keys of a file or folder, or of a word of TEACHERS.
PATHS = ("path", "media_dir", "init_from", "start_from", "teacher", "codec")


def path_is(path: Path, kind: str) -> bool:
    """path.is_dir() and friends, False for text that cannot be a path (too long, a NUL in it)."""
    try:
        return {"dir": path.is_dir, "file": path.is_file, "any": path.exists}[kind]()
    except (OSError, ValueError):
        return False


def near_names(path: Path) -> str:
    """The names in the deepest folder of `path` that exists, nearest first: '; did you mean 'x'?' or what is
    there.
    """
    parent = path.parent
    if not path_is(parent, "dir"):
        return f" ({str(parent)!r} does not exist)"
    try:
        names = sorted(child.name for child in parent.iterdir() if not child.name.startswith("."))[:500]
    except OSError:
        return ""
    hint = did_you_mean(path.name, names)
    return (
        hint
        if hint
        else (
            f" (in {str(parent)!r} there is {', '.join(names[:4])})"
            if names
            else f" ({str(parent)!r} is empty)"
        )
    )


def globs(pattern: str) -> bool:
    try:
        return any(True for _ in glob.iglob(pattern, recursive=True))
    except (OSError, ValueError, RecursionError, re.error):
        return False


def located(value: Any, folders: Sequence[Path]) -> Any:
    """A section whose relative paths are given from the first of `folders` that has them; a path that none
    has stays, and so does everything else. The current folder, as Path(), leaves a path as it was.
    """
    if not isinstance(value, BaseModel):
        return value
    changed: dict[str, Any] = {}
    for name, child in value:
        moved = child
        if isinstance(child, BaseModel):
            moved = located(child, folders)
        elif isinstance(child, list) and any(isinstance(item, BaseModel) for item in child):
            moved = [located(item, folders) for item in child]
        elif name == "chat_template" and isinstance(child, str) and not is_text(child):
            moved = _from(child, folders)
        elif name in PATHS and isinstance(child, str) and child not in TEACHERS:
            moved = _from(child, folders)
        elif name == "tasks":  # names of lm-eval, or files
            moved = [_from(task, folders) for task in child]
        if moved is not child and moved != child:
            changed[name] = moved
    return value.model_copy(update=changed) if changed else value


def _from(path: str, folders: Sequence[Path]) -> str:
    folder = next((folder for folder in folders if _exists(os.path.join(folder, path))), Path())
    return path if folder == Path() else os.path.join(folder, path)


def _exists(path: str) -> bool:
    """Whether a path or glob names something; text that cannot be a path does not."""
    try:
        return os.path.lexists(path) or bool(glob.glob(path))
    except (OSError, ValueError, RecursionError, re.error):
        return False
