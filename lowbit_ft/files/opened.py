"""OpenedFiles: whether the files that a run computes with are still the ones it opened.

A packed base on a CPU is pages of its files (model/mapped.py). Another program that writes to such a file
changes what is computed; one that cuts it takes pages away, and the process that reads them next is ended by
the system with a bus error, before it can say a word. So a run asks `check` at the end of every step, and
`LastWords` says what happened for a run that cannot: a small process of its own that waits for the end of
this one.
"""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

from .errors import FileError

_State = tuple[int, ...]
_ADVICE = (
    "by another program while this run was computing with it, so what it computed since cannot be trusted "
    "and is not kept. Run the line again: it goes on from the last checkpoint, with a base/ packed anew"
)
# Waits until the pipe from its parent closes. A byte in it is a goodbye; without one the parent was killed.
_WAITING = """
import json, os, sys
before, advice = json.loads(sys.argv[1]), sys.argv[2]
if not sys.stdin.buffer.read():
    for path, state in before:
        try:
            stat = os.lstat(path)
            now = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
        except OSError:
            now = None
        if now != state:
            print(f"error: {path}: was {'deleted' if now is None else 'changed'} {advice}", file=sys.stderr)
"""


class OpenedFiles:
    """The safetensors files of a folder as they were when this was made, a moment before they are read.

    advice: what to do once they changed; what follows "was deleted" or "was replaced".
    """

    def __init__(self, folder: Path, advice: str = _ADVICE):
        self.advice = advice
        self.files = {path: _state(path) for path in sorted(Path(folder).absolute().glob("*.safetensors"))}

    def check(self) -> None:
        """FileError naming the first file that was deleted, replaced or written to since; a few microseconds
        each.
        """
        for path, before in self.files.items():
            now = _state(path)
            if now == before:
                continue
            what = "was deleted" if now is None else "was replaced or written to"
            if now is not None and before is not None and now[2] != before[2]:
                what += f" ({before[2]:,} bytes before, {now[2]:,} now)"
            raise FileError(f"{path}: {what} {self.advice}")


class LastWords:
    """Says, after this process was ended by the system, which of the files had changed; silent when none has,
    and after `goodbye`, which comes by itself when the process ends as it should.
    """

    def __init__(self, opened: OpenedFiles):
        facts = json.dumps([(str(path), state) for path, state in opened.files.items()])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WAITING, facts, opened.advice],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # ctrl-C is not for it
        )
        self.goodbye = weakref.finalize(self, _goodbye, self.process, os.getpid())


def _goodbye(process: subprocess.Popen[bytes], parent: int) -> None:
    if os.getpid() != parent:  # a forked child has the pipe too; it is not what is waited for
        return
    try:
        process.communicate(b"x", timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # it is gone, or stuck: nobody needs it any more
        process.kill()
        process.wait()


def _state(path: Path) -> _State | None:
    """What tells one file from another and from itself before a write; None when it is not there."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
