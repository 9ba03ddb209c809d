"""files.py: whatever moment a process is killed at, the old or the new content is there, whole, or comes
back.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit_ft.files.atomic import (
    leftover_of,
    recover,
    recover_all,
    remove_folder,
    staged_folder,
    visible_names,
    write_bytes,
    write_text,
)
from lowbit_ft.files.errors import FileError
from lowbit_ft.files.manifest import file_entry

ROOT = Path(__file__).resolve().parents[2]
# Forks a process per folder "1", "2", ...; the n-th kills itself before its n-th file operation, which the
# interpreter reports to an audit hook. Prints how many died; the one after them finished.
CHILD = """
import os, signal, sys
from pathlib import Path
from lowbit_ft.files.atomic import recover, remove_folder, staged_folder, write_text

def act(what, target, deadline):
    def hook(event, _):
        nonlocal deadline
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            deadline -= 1
            if deadline == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    if what == "folder":
        with staged_folder(target) as stage:
            (stage / "a").write_text("new")
            (stage / "sub").mkdir()
            (stage / "sub" / "b").write_text("new")
    elif what == "file":
        write_text(target, "new")
    else:
        {"recover": recover, "remove": remove_folder}[what](target)

for n in range(1, int(sys.argv[3]) + 1):
    if not (child := os.fork()):
        act(sys.argv[1], Path(sys.argv[2]) / str(n) / "model", n)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        print(n - 1)
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""
MOST = 60  # operations that any of them makes, and some
TOKEN = "lowbit_ft-0123456789abcdef"


def kill_at_each(what: str, folder: Path, prepare: Callable[[Path], object]) -> list[tuple[Path, bool]]:
    """`what` done to folder/n/model, killed at its n-th operation: [(the target, whether it died)], the last
    did not.
    """
    for n in range(1, MOST + 1):
        (folder / str(n)).mkdir(parents=True)
        prepare(folder / str(n) / "model")
    command = [sys.executable, "-c", CHILD, what, str(folder), str(MOST)]
    died = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    return [(folder / str(n) / "model", n <= died) for n in range(1, died + 2)]


def make(folder: Path, text: str = "old") -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text(text)
    (folder / "sub" / "b").write_text(text)
    return folder


def content(folder: Path) -> str:
    """The text of a folder of `make`; every file has to hold the same one."""
    assert sorted(p.name for p in folder.rglob("*")) == ["a", "b", "sub"]
    text = (folder / "a").read_text()
    assert (folder / "sub" / "b").read_text() == text
    return text


@pytest.mark.parametrize("again", ["recover", "recover_all", "staged_folder", "rm -r"])
def test_a_folder_survives_a_kill_at_every_operation(tmp_path: Path, again: str) -> None:
    seen = []
    for target, _ in kill_at_each("folder", tmp_path, make):
        seen.append(content(target) if target.exists() else "gone")
        if again == "staged_folder":  # an error in the next use changes nothing either
            with pytest.raises(RuntimeError), staged_folder(target):
                raise RuntimeError
        elif again == "recover":
            recover(target)
        elif again == "rm -r" and seen[-1] == "new":  # a half-deleted old folder must not come back then
            shutil.rmtree(target)
            recover(target)
            assert not target.exists() or content(target) == "old"
            continue
        else:
            recover_all(target.parent)
        assert content(target) == ("new" if seen[-1] == "new" else "old")
        assert os.listdir(target.parent) == ["model"]
    order = sorted(seen, key=["old", "gone", "new"].index)
    assert (
        seen == order and seen.count("gone") == 1
    )  # it was killed between the two renames, and only there is nothing
    assert seen.count("old") > 8 and seen.count("new") > 3


@pytest.mark.parametrize("there", [True, False])
def test_recovering_survives_a_kill_too(there: bool, tmp_path: Path) -> None:
    """Deleting goes by steps in which no half of a folder can come back."""

    def prepare(target: Path) -> None:
        make(target.with_name(f".model.{TOKEN}.replaced"))
        make(target.with_name(f".model.{TOKEN}.partial"), "half")
        make(target.with_name(f".model.{TOKEN}.removed"), "gone")
        if there:
            make(target, "new")

    ends = kill_at_each("recover", tmp_path, prepare)
    assert len(ends) > 6
    for target, died in ends:
        if there and died:  # worse: somebody deletes what stands under the name before the next use
            remove_folder(target)
            recover(target)
            assert not target.exists() or content(target) == "old"
        else:
            recover(target)
            assert content(target) == ("new" if there else "old")
        assert set(os.listdir(target.parent)) <= {"model"}


def test_a_removed_folder_is_whole_or_gone(tmp_path: Path) -> None:
    seen = set()
    for target, _ in kill_at_each("remove", tmp_path, make):
        recover(target)
        seen.add(content(target) if target.exists() else "gone")
        assert set(os.listdir(target.parent)) <= {"model"}
    assert seen == {"old", "gone"}


def test_a_file_survives_a_kill_at_every_operation(tmp_path: Path) -> None:
    seen = set()
    for target, _ in kill_at_each("file", tmp_path, lambda target: target.write_text("old")):
        seen.add(target.read_text())
        assert visible_names(target.parent) == ["model"]
        write_text(target, "again")
        assert target.read_text() == "again" and os.listdir(target.parent) == ["model"]
    assert seen == {"old", "new"}


@pytest.mark.parametrize("step", range(4))
def test_an_operation_that_fails_leaves_the_target_untouched(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill, but the process lives on: a full disk at a sync or a rename."""
    target, calls = make(tmp_path / "model"), 0

    def failing(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise OSError(errno.ENOSPC, "disk full")
            return real(*args)

        return call

    for name in ("rename", "fsync", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    with (
        pytest.raises(FileError, match=r"model: could not be written \(disk full\)"),
        staged_folder(target) as stage,
    ):
        (stage / "a").write_text(
            "new"
        )  # operations: fsync of a, of the stage, rename old away, rename new in
    assert content(target) == "old" and os.listdir(tmp_path) == ["model"]
    if step < 2:  # fsync and replace
        calls = 0
        with pytest.raises(FileError, match=r"model/a: could not be written \(disk full\)"):
            write_bytes(target / "a", b"new")
        assert content(target) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_target_may_be(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new" / "deep") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "new" / "deep" / "a").read_text() == "1"
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ValueError, match="file: exists and is not a folder"),
        staged_folder(tmp_path / "file"),
    ):
        pytest.fail("nothing may be written")
    real = make(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    with staged_folder(
        tmp_path / "link"
    ) as stage:  # the link is replaced, what it leads to is not ours to delete
        (stage / "a").write_text("2")
    assert not (tmp_path / "link").is_symlink() and content(real) == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "new", "real"]


def test_names_and_entries(tmp_path: Path) -> None:
    assert (
        leftover_of(f".a.b.{TOKEN}.partial") == "a.b"
        and leftover_of(f".x.{TOKEN}.replaced") == leftover_of(f".x.{TOKEN}.removed") == "x"
    )
    others = (f"x.{TOKEN}.partial", ".git", f"..{TOKEN}.partial", f".x.{TOKEN}.partial.txt", ".x.partial")
    assert [leftover_of(name) for name in (*others, f".x.{TOKEN[:-1]}.partial")] == [None] * 6
    recover_all(tmp_path / "nowhere")
    write_text(tmp_path / "é", "ü\n")
    (tmp_path / ".hidden").mkdir()
    assert visible_names(tmp_path) == ["é"]
    assert file_entry(tmp_path / "é") == {"bytes": 3, "sha256": hashlib.sha256(b"\xc3\xbc\n").hexdigest()}
