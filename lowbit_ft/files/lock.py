"""FolderLock: one process at a time writes to the folder of a run.

The lock is one of the kernel (flock) on `.lowbit_ft.lock` in the folder, so it is gone when its holder is,
however that ended: a file that a killed process left behind locks nothing. The file says who holds it, for
the message to the second one. Reading needs no lock. Under torchrun the main process holds it; the others
write nothing.
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import warnings
import weakref
from pathlib import Path
from typing import IO, Any

from .atomic import is_same_file
from .errors import FileError, writing
from .jsonfile import parse_json

LOCK = ".lowbit_ft.lock"
LONGEST = 1 << 20  # characters of the file that are read
SHOWN = 100  # characters of the holder's command in a message
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


class FolderLock:
    """Held from `FolderLock(folder)` until `release`, or until nobody refers to it, or the process ends."""

    def __init__(self, folder: Path):
        """FileError naming the holder (process, host, since when, command) when there is one."""
        self.path = Path(folder) / LOCK
        while True:
            with writing(self.path):
                self.file: IO[Any] = open(  # noqa: SIM115  (held open: closing it releases the lock)
                    os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8"
                )
            self._take()
            if is_same_file(self.file.fileno(), self.path):  # not deleted between opening and locking it
                break
            self.file.close()
        if not _held:
            _close_in_children()
        _held.add(self)
        with writing(self.path):
            self.file.truncate(0)
            json.dump(_this_process(), self.file)
            self.file.flush()

    def _take(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warnings.warn(
                    f"{self.path}: this file system has no locks ({error.strerror}); see to it that only one "
                    "process writes to this folder",
                    stacklevel=4,
                )
                return
            holder = _holder(self.file)
            self.file.close()
            raise FileError(
                f"{self.path.parent}: another process is writing to this folder: {holder}. Wait until it has "
                "ended, stop it, or choose another folder (a run: another `output`). Commands that only read "
                "go on meanwhile"
            ) from None

    def check(self) -> None:
        """FileError when the folder, or the lock in it, was deleted or replaced since."""
        if not is_same_file(self.file.fileno(), self.path):
            raise FileError(
                f"{self.path.parent}: this folder was deleted or replaced while this process was writing to "
                "it, so another one may be writing there too; nothing more is written. Run the line again"
            )

    def release(self) -> None:
        if not self.file.closed:
            if is_same_file(self.file.fileno(), self.path):
                self.file.seek(0)
                self.file.truncate(0)
            self.file.close()
        _held.discard(self)


def _this_process() -> dict[str, Any]:
    program = Path(sys.argv[0]).name if sys.argv else "python"
    command = shlex.join(["lowbit-ft" if program == "__main__.py" else program, *sys.argv[1:]])
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started, "command": command}


def _holder(file: IO[str]) -> str:
    """Who holds a lock, in words."""
    try:
        file.seek(0)
        facts = parse_json(file.read(LONGEST).encode(), LOCK, dict[str, Any])
        mine = facts["pid"] == os.getpid() and facts["host"] == socket.gethostname()
        who = "this very process" if mine else f"process {facts['pid']} on {facts['host']}"
        command = str(facts["command"])
        shown = command if len(command) <= SHOWN else f"{command[:SHOWN]} ..."
        return f"{who}, since {facts['started']}, `{shown}`"
    except (OSError, ValueError, KeyError, TypeError):  # it has taken it just now and not written yet
        return "one that has started just now"


_registered = False


def _close_in_children() -> None:
    """A forked child shares its parent's locks: without this, a loader's worker that outlives a killed run
    would keep the folder locked.
    """
    global _registered
    if not _registered:
        os.register_at_fork(after_in_child=lambda: [lock.file.close() for lock in list(_held)])
        _registered = True
