"""Files and folders that the user named: what is to be there, and where a command may write (where nothing
is, unless the user insists)."""

from pathlib import Path

LARGEST_SEED = (1 << 63) - 1  # what torch's generators take


def refuse_existing(output: Path, force: bool, other: str) -> None:
    """ValueError when something is at `output` and not `force`; other: how to name another place."""
    if (output.exists() or output.is_symlink()) and not force:
        raise ValueError(f"{output} exists; nothing was written; {other}, or give --force")


def folder_at(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no folder at {path}; give the folder that `lowbit-ft run` wrote")
    if not path.is_dir():
        raise ValueError(f"got {path}, a file; give a folder")
    return path
