"""Where a command may write a file that the user named: where there is none, unless the user insists."""

from pathlib import Path


def refuse_existing(output: Path, force: bool, other: str) -> None:
    """ValueError when something is at `output` and not `force`; other: how to name another place."""
    if (output.exists() or output.is_symlink()) and not force:
        raise ValueError(f"{output} exists; nothing was written; {other}, or give --force")
