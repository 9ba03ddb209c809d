"""Opening a file that somebody else named: a regular one, never a pipe or a device, which may not end or not
begin.

`open` waits at a FIFO until somebody writes to it, and reading /dev/zero never ends. Links are followed:
where they may lead is decided by who knows the folder (model/hub.py).
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

MAX_CARD = 4 << 20  # bytes of a README.md that is read: the longest cards of the hub have some 100 kB


def open_regular(path: str | Path) -> FileIO:
    """The file opened for reading, unbuffered. OSError as `open` raises it; ValueError naming the file when
    it is no regular file."""
    _refuse_irregular(path, os.stat(path).st_mode)  # before the open: opening a device may act on it
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _refuse_irregular(path, os.fstat(handle).st_mode)  # it may have been replaced since
        return FileIO(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. OSError as `open` raises it; ValueError naming
    the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path}: got {size} bytes; allowed: at most {limit}; is this another file?")
        parts = []
        left = limit + 1
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
        if not left:
            raise ValueError(f"{path}: got more than {limit} bytes; it grew while it was read")
    return b"".join(parts)


def read_card(path: str | Path) -> str:
    """The text of a README.md. OSError as `open` raises it; ValueError naming the file when it is too large,
    no regular file or no text."""
    data = read_regular(path, MAX_CARD)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8, or remove it") from None


def irregular(path: str | Path) -> str | None:
    """What a path is that is neither a regular file nor a folder: "a pipe", "a device", "a socket"; else
    None, also where nothing is."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return None if stat.S_ISDIR(mode) else _irregular(mode)


def _refuse_irregular(path: str | Path, mode: int) -> None:
    if (what := _irregular(mode)) is not None:
        raise ValueError(f"{path}: got {what}; allowed: a regular file")


def _irregular(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe (FIFO)"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"
