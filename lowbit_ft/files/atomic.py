"""Files and folders that a killed process cannot leave half written, and that two processes cannot mix.

Whatever is written is made beside its place under a hidden name, fsynced and renamed. A folder cannot be
renamed over a full one, so the old one steps aside first; what stands beside `name` after a kill tells how
far it came:

    .name.lowbit_ft-TOKEN.partial    being written: deleted at the next use
    .name.lowbit_ft-TOKEN.replaced   the old folder while the new one moves in: moved back if `name` is not
                                     there, else deleted
    .name.lowbit_ft-TOKEN.removed    being deleted: deleted at the next use

TOKEN is drawn anew each time (16 hex digits), so no two writers share a name and no file of somebody else
has one. Who writes holds a lock of the kernel (flock) on what it writes: a leftover is one that nobody holds,
and only such a one is touched. (Some network file systems lock no folders; there a run's own lock, lock.py,
keeps a second writer away.)

So at every instant the old or the new content, whole, is at `name`, or comes back to it by `recover`, which
the next `staged_folder` calls first.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FileError, writing

_LEFTOVER = re.compile(r"\.(.+)\.lowbit_ft-[0-9a-f]{16}\.(partial|replaced|removed)", re.DOTALL)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` in UTF-8: a reader sees the old content or the new, never half of
    it.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` of bytes. FileError, naming the file, when the disk refuses."""
    with writing(path):
        for left in _leftovers(path):
            with _unheld(left) as dead:
                if dead:
                    _delete(left)
        partial = _beside(path, "partial")
        try:
            with partial.open("xb") as file:
                _hold(file.fileno())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `target` when the block ends well.

    On an error it is deleted and `target` is untouched. Parents are made. ValueError when `target` is a file,
    FileError when the disk refuses or somebody else took the new folder away.
    """
    target = target.absolute()
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target}: exists and is not a folder; choose another place")
        stage, handle = _new_stage(target)
    try:
        yield stage
        with writing(target):
            for path in [*stage.rglob("*"), stage]:
                sync(path)
            if not is_same_file(handle, stage):
                raise FileError(
                    f"{target}: the folder in which it was written was replaced by another program; run the "
                    "line again"
                )
            _swap(stage, target)
    except BaseException:
        if is_same_file(handle, stage):
            _delete(stage)
        raise
    finally:
        os.close(handle)


def _swap(stage: Path, target: Path) -> None:
    """Put a written folder in its place; the one that is there steps aside and is deleted."""
    replaced = _beside(target, "replaced")
    if not os.path.lexists(target):
        os.rename(stage, target)
        sync(target.parent)
        return
    with _unheld(target) as alone:
        if not alone:
            raise FileError(f"{target}: another process is replacing it; run the line again")
        try:
            os.rename(target, replaced)
            os.rename(stage, target)
        except BaseException:
            if os.path.lexists(replaced) and not os.path.lexists(target):
                os.rename(replaced, target)
            raise
        sync(target.parent)
        _remove(replaced, target)


def remove_folder(target: Path) -> None:
    """Delete a folder; half of one never stands under its name."""
    _remove(target, target)


def recover(target: Path) -> None:
    """Settle what a killed process left beside `target`: the old folder comes back if no new one is there,
    the rest goes. What a living process is writing stays.
    """
    for left in _leftovers(target):
        with _unheld(left) as dead:
            if not dead:
                continue
            if not left.name.endswith(".replaced"):
                _delete(left)
            elif os.path.lexists(target):
                _remove(left, target)
            else:
                os.rename(left, target)


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


def free_name(path: Path) -> Path:
    """`path`, or with -1, -2, ... behind it the first name that nothing has."""
    candidate, n = path, 1
    while os.path.lexists(candidate):
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate


def is_same_file(handle: int, path: Path) -> bool:
    """Whether an open file (or folder) is still the one under that name."""
    try:
        there = os.lstat(path)
    except OSError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.lowbit_ft-{secrets.token_hex(8)}.{what}")


def _leftovers(target: Path) -> list[Path]:
    """What stands beside `target` under names of `_beside`, the last change first: of two old folders the
    later one comes back.
    """
    if not target.parent.is_dir():
        return []
    with os.scandir(target.parent) as entries:
        names = [entry.name for entry in entries if leftover_of(entry.name) == target.name]
    found = [target.with_name(name) for name in names]
    return sorted((p for p in found if os.path.lexists(p)), key=lambda p: -os.lstat(p).st_ctime_ns)


def _new_stage(target: Path) -> tuple[Path, int]:
    """An empty hidden folder beside `target`, and an open handle by which this process holds it."""
    while True:
        stage = _beside(target, "partial")
        stage.mkdir()
        handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        # In between somebody may have taken it for a leftover; then there is another token.
        if _hold(handle) and is_same_file(handle, stage):
            return stage, handle
        os.close(handle)


def _hold(handle: int) -> bool:
    """Lock an open file or folder until it is closed; False when another process (or handle) holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # others: no locks here, see above
    return True


@contextmanager
def _unheld(path: Path) -> Iterator[bool]:
    """Whether no process holds `path`; if so this one does in the block. A link is nobody's."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield os.path.lexists(path)
        return
    try:
        yield _hold(handle) and is_same_file(handle, path)
    finally:
        os.close(handle)


def _remove(path: Path, target: Path) -> None:
    """Delete `path`, renamed first: a folder called .replaced is whole, it may have to come back."""
    removed = _beside(target, "removed")
    os.rename(path, removed)
    _delete(removed)


def _delete(path: Path) -> None:
    """What cannot be deleted stays under its hidden name, and the next use tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
