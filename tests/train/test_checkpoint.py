"""Checkpoints: complete under their name or not there, damage found and named, generators restored."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit_ft.files import atomic as files
from lowbit_ft.files.errors import FileError
from lowbit_ft.files.manifest import sealed
from lowbit_ft.train import checkpoint
from lowbit_ft.train.checkpoint import (
    ADAPTER,
    MANIFEST,
    OPTIMIZER,
    STATE,
    Checkpoints,
    rng_state,
    set_rng_state,
)

FILES = [ADAPTER, OPTIMIZER, STATE, MANIFEST]


def save(store: Checkpoints, step: int, best: int | None = None) -> Path:
    g = torch.Generator().manual_seed(step)
    tensors = {"layer.A": torch.randn(3, 4, generator=g)}
    return store.save(step, tensors, {"layer.A/exp_avg": tensors["layer.A"] * 2}, {"progress": step}, best)


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_what_is_saved_is_read(store: Checkpoints) -> None:
    assert store.steps() == [] and store.newest() is None and store.newest_valid() is None
    path = save(store, 7)
    assert path.name == "step-00000007" and sorted(p.name for p in path.iterdir()) == sorted(FILES)
    saved = store.newest()
    assert saved is not None and saved.path == path and saved.state == {"progress": 7}
    g = torch.Generator().manual_seed(7)
    assert torch.equal(saved.adapter["layer.A"], torch.randn(3, 4, generator=g))
    assert torch.equal(saved.optimizer["layer.A/exp_avg"], saved.adapter["layer.A"] * 2)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    a, b = (save(Checkpoints(tmp_path / name), 3) for name in "ab")
    for name in FILES:
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_old_ones_go_but_never_the_best_nor_the_newest(store: Checkpoints) -> None:
    for step in (10, 20, 30, 40):
        save(store, step, best=10)
    assert store.steps() == [10, 30, 40]
    save(store, 50, best=50)
    assert store.steps() == [40, 50]
    assert not list(store.folder.glob(".*"))
    one = Checkpoints(store.folder, keep=0)  # at least the newest stays
    save(one, 60)
    assert one.steps() == [60]


def test_saving_a_step_again_replaces_it(store: Checkpoints) -> None:
    save(store, 5)
    store.save(5, {"w": torch.ones(1)}, {}, {"second": True}, None)
    assert store.read(5).state == {"second": True} and store.steps() == [5]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Any] = {
    "flipped bit": flip,
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-3]),
    "empty": lambda p: p.write_bytes(b""),
    "missing": lambda p: p.unlink(),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", list(DAMAGE))
def test_damaged_newest_is_named_and_skipped(store: Checkpoints, how: str, file: str) -> None:
    save(store, 1)
    bad = save(store, 2)
    DAMAGE[how](bad / file)
    assert store.newest_valid() == 1 and bad.exists()  # looking changes nothing
    with pytest.raises(ValueError, match="step-00000002"):
        store.read(2)
    with pytest.warns(UserWarning, match=r"skipped a damaged checkpoint: .*step-00000002/.*corrupt"):
        saved = store.newest()
    assert saved is not None and saved.state == {"progress": 1}
    assert store.steps() == [1] and bad.with_suffix(".corrupt").is_dir()
    save(store, 2)
    assert store.newest_valid() == 2


def test_all_damaged_is_none(store: Checkpoints) -> None:
    for step in (1, 2):
        flip(save(store, step) / ADAPTER)
    with pytest.warns(UserWarning):
        assert store.newest() is None


def test_another_format_is_not_read(store: Checkpoints) -> None:
    path = save(store, 1) / MANIFEST
    path.write_bytes(sealed(json.loads(path.read_text()) | {"format": 99}))
    assert "format 99; this version reads 1" in (store.problem(1) or "")


def test_a_flipped_bit_of_the_manifest_is_damage(store: Checkpoints) -> None:
    path = save(store, 1) / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert MANIFEST in (store.problem(1) or ""), place
    path.write_bytes(whole)
    assert store.problem(1) is None


def test_a_disk_that_is_full_is_an_error_of_one_line_and_costs_no_checkpoint(store: Checkpoints) -> None:
    """The system refuses files above a size, as a full disk does; the library's error is its own kind."""
    save(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(FileError) as caught:
            save(store, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{ADAPTER}: could not be written (" in str(caught.value) and "Make room" in str(caught.value)
    assert store.steps() == [1] and store.problem(1) is None and not list(store.folder.glob(".*"))


def test_a_checkpoint_with_a_file_of_somebody_stays(store: Checkpoints) -> None:
    (save(store, 1) / "notes.txt").write_text("mine")
    for step in range(2, 6):
        save(store, step)
    assert 1 in store.steps() and 2 not in store.steps()


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs, so the clean-up is switched off with it."""


def test_killed_anywhere_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die at every write, sync, rename and delete of a save: the newest valid checkpoint is the old or the
    new one, complete, and the leftovers are cleaned."""
    points = [
        (checkpoint, "save_tensors"),
        (checkpoint, "file_entry"),
        (Path, "write_text"),
        (Path, "write_bytes"),
    ]
    points += [(files, "sync"), (files.os, "rename"), (files.shutil, "rmtree")]
    outcomes = set()
    for deadline in range(1, 60):
        store = Checkpoints(tmp_path / str(deadline), keep=1)
        save(store, 1)
        count = 0

        def tick(deadline: int = deadline) -> None:
            nonlocal count
            count += 1
            if count >= deadline:
                raise Killed

        def dying(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                tick()
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in points:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save(store, 2)
                finished = True
            except Killed:
                finished = False
        again = Checkpoints(store.folder, keep=1)
        again.clean()
        saved = again.newest()
        assert saved is not None and saved.state["progress"] in (1, 2)
        assert not list(store.folder.glob(".*"))
        outcomes.add(saved.state["progress"])
        if finished:
            break
    else:
        pytest.fail("the save never finished")
    assert outcomes == {1, 2} and deadline > 10


def test_generators_come_back() -> None:
    device = torch.device("cpu")
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    np.random.randn()  # leaves a cached gaussian
    tensors, numbers = rng_state(device)
    numbers = json.loads(json.dumps(numbers))
    first = [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(3).tolist()]
    both = torch.stack([torch.zeros_like(tensors["cpu"]), tensors["cpu"]])  # as several processes are stored
    set_rng_state({"cpu": both[1]}, numbers, device)
    assert [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(3).tolist()] == first
