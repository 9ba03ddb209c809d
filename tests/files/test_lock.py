"""FolderLock: one writer, told who it is; nobody locks anything from the grave."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit_ft.files.atomic import recover, staged_folder
from lowbit_ft.files.errors import FileError
from lowbit_ft.files.lock import LOCK, FolderLock
from tests.processes import ROOT, environment

# Holds a lock, and a stage, until it is killed; with "fork" a child of it lives on.
CHILD = """
import os, sys, time
from pathlib import Path
from lowbit_ft.files.atomic import staged_folder
from lowbit_ft.files.lock import FolderLock

folder = Path(sys.argv[1])
lock = FolderLock(folder)
with staged_folder(folder / "base") as stage:
    (stage / "a").write_text("half")
    if sys.argv[2] == "fork":
        if os.fork():
            time.sleep(600)
        print("held", flush=True)  # the child: what it does with its parent's locks is done by now
        os.closerange(0, 3)
        time.sleep(600)
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), how],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_one_is_told_who_is_first_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    first = holder(tmp_path)
    (stage,) = tmp_path.glob(".base.*")
    try:
        with pytest.raises(FileError) as caught:
            FolderLock(tmp_path)
        said = str(caught.value)
        assert f"process {first.pid} on {os.uname().nodename}, since 2" in said
        assert str(tmp_path) in said and "only read" in said
        recover(tmp_path / "base")  # what a living process writes is not a leftover
        assert (stage / "a").read_text() == "half"
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / LOCK).stat().st_size > 0  # it still names the dead one, and locks nothing
    again = FolderLock(tmp_path)
    assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    again.release()
    assert (tmp_path / LOCK).read_text() == ""
    recover(tmp_path / "base")
    assert not stage.exists()


def test_a_worker_that_outlives_a_killed_run_does_not_keep_it_locked(tmp_path: Path) -> None:
    first = holder(tmp_path, "fork")
    try:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        FolderLock(tmp_path).release()
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_in_one_process(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.check()
    with pytest.raises(FileError, match="this very process, since"):
        FolderLock(tmp_path)
    del lock
    gc.collect()
    lock = FolderLock(tmp_path)  # whom nobody refers to holds nothing
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    other = FolderLock(tmp_path)
    with pytest.raises(FileError, match="was deleted or replaced while"):
        lock.check()
    lock.release()
    other.check()
    assert str(os.getpid()) in (tmp_path / LOCK).read_text()  # the other's words were left alone


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="this file system has no locks"):
        FolderLock(tmp_path).check()
    with staged_folder(tmp_path / "base") as stage:
        (stage / "a").touch()
    assert (tmp_path / "base" / "a").exists()


def test_a_stage_that_somebody_replaces_is_not_moved_in(tmp_path: Path) -> None:
    target = tmp_path / "base"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(FileError, match="replaced by another program"), staged_folder(target) as stage:
        shutil.rmtree(stage)
        stage.mkdir()
        (stage / "a").write_text("theirs")
    assert (target / "a").read_text() == "old" and (stage / "a").read_text() == "theirs"


def test_two_writers_of_one_folder_without_a_lock_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with staged_folder(target) as one:
        (one / "a").write_text("one")
        with staged_folder(target) as two:
            assert one.exists() and one != two
            (two / "a").write_text("two")
        assert (target / "a").read_text() == "two"
    assert (target / "a").read_text() == "one" and os.listdir(tmp_path) == ["m"]


def test_what_is_not_ours_beside_the_target_stays(tmp_path: Path) -> None:
    theirs = [".m.partial", ".m.replaced", ".m.removed", ".m.lowbit_ft-1.partial", ".x.partial"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("mine")
    for _ in range(2):
        with staged_folder(tmp_path / "m") as stage:
            (stage / "a").write_text("new")
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "m"])
    assert all((tmp_path / name / "a").read_text() == "mine" for name in theirs)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff", b"[1]", b"{}"])
def test_a_holder_that_says_nonsense_is_a_holder(content: bytes, tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("wb") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FileError, match="another process is writing .*: one that has started"):
            FolderLock(tmp_path)
