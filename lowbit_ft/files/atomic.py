"""Files and folders that a killed process cannot leave half written.

Whatever is written is made beside its place under a hidden name, fsynced and renamed. A folder cannot be
renamed over a full one, so the old one steps aside first; what stands beside `name` after a kill tells how
far it came:

    .name.partial    being written: deleted at the next use
    .name.replaced   the old folder while the new one moves in: moved back if `name` is not there, else
                     deleted
    .name.removed    being deleted: deleted at the next use

So at every instant the old or the new content, whole, is at `name`, or comes back to it by `recover`, which
the next `staged_folder` calls first. One process writes a name at a time.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .regular import open_regular

_LEFTOVER = re.compile(r"\.(.+)\.(?:partial|replaced|removed)", re.DOTALL)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` in UTF-8: a reader sees the old content or the new, never half of
    it.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` of bytes."""
    partial = _beside(path, "partial")
    try:
        partial.write_bytes(data)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `target` when the block ends well.

    On an error it is deleted and `target` is untouched. Parents are made. ValueError when `target` is a file.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: exists and is not a folder; choose another place")
    stage, replaced = _beside(target, "partial"), _beside(target, "replaced")
    stage.mkdir()
    try:
        yield stage
        for path in [*stage.rglob("*"), stage]:
            sync(path)
        if os.path.lexists(target):
            os.rename(target, replaced)
        os.rename(stage, target)
    except BaseException:
        _delete(stage)
        if os.path.lexists(replaced) and not os.path.lexists(target):
            os.rename(replaced, target)
        raise
    sync(target.parent)
    if os.path.lexists(replaced):
        _remove(replaced, target)


def remove_folder(target: Path) -> None:
    """Delete a folder; half of one never stands under its name."""
    _remove(target, target)


def recover(target: Path) -> None:
    """Settle what a killed process left beside `target`: the old folder comes back if no new one is there,
    the rest goes.
    """
    replaced = _beside(target, "replaced")
    for left in ("partial", "removed"):
        _delete(_beside(target, left))
    if os.path.lexists(replaced):
        if os.path.lexists(target):
            _remove(replaced, target)
        else:
            os.rename(replaced, target)


def recover_all(folder: Path) -> None:
    """`recover` for every name in `folder`; nothing when there is no such folder."""
    names = {leftover_of(path.name) for path in folder.iterdir()} if folder.is_dir() else set()
    for name in names - {None}:
        recover(folder / str(name))


def leftover_of(name: str) -> str | None:
    """The file or folder that a killed process was writing or deleting under this hidden name; None for other
    names.
    """
    match = _LEFTOVER.fullmatch(name)
    return match[1] if match else None


def visible_names(folder: Path) -> list[str]:
    """The names in a folder, sorted, without hidden ones: a leftover of a kill does not make a folder
    somebody's.
    """
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def file_entry(path: Path) -> dict[str, Any]:
    """What manifests say of a file: {"bytes": its size, "sha256": hex digest}."""
    with open_regular(path) as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _remove(path: Path, target: Path) -> None:
    """Delete `path`, renamed first: a folder called .replaced is whole, it may have to come back."""
    removed = _beside(target, "removed")
    _delete(removed)
    os.rename(path, removed)
    _delete(removed)


def _delete(path: Path) -> None:
    """What cannot be deleted stays under its hidden name, where the next use says so if it is in the way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
