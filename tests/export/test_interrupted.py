"""An export that does not come to its end leaves nothing that looks like a model: killed, out of disk, not
allowed to write.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.export import EXPORTERS, LayerSpec, Weights, gguf_file, shards
from lowbit_ft.export.folder import check_files
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.atomic import leftover_of
from lowbit_ft.model.checkpoint import Checkpoint
from tests.forks import run
from tests.packed_tools import int_grid, random_weights, tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ASSET = ROOT / "recipes" / "assets" / "tiny-llama"
CHILD = """
import os, signal, sys
from lowbit_ft.export import EXPORTERS, LayerSpec, Weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from tests.packed_tools import int_grid, random_weights
source = Checkpoint.open(sys.argv[1], dtype="float32")
weights = random_weights(source.empty_model(), int_grid())
asked = []
def make(name):
    asked.append(name)
    if len(asked) == 4:
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    return weights[name]
specs = {n: LayerSpec.of(w) for n, w in weights.items()}
write_model(sys.argv[2], source, Weights(specs, make), EXPORTERS[sys.argv[3]])
"""


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    path = tiny_checkpoint(tmp_path / "source", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ASSET / name, path / name)
    return Checkpoint.open(path, dtype="float32")


def killed(source: Checkpoint, target: Path, name: str, how: str) -> subprocess.CompletedProcess[str]:
    return run(["-c", CHILD, source.folder, target, name, how])


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf"])
def test_a_killed_export_leaves_no_folder_that_loads_and_the_next_one_cleans_up(
    name: str, source: Checkpoint, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "m"
    assert killed(source, target, name, "SIGKILL").returncode == -signal.SIGKILL
    left = [path.name for path in target.parent.iterdir()]
    assert [leftover_of(name) for name in left] == ["m"]
    # hidden, and without the files by which a reader would know a model
    assert not {"config.json", "lowbit_ft.json"} & {path.name for path in (target.parent / left[0]).iterdir()}
    for folder in (target, target.parent / left[0]):
        with pytest.raises(ValueError, match="config.json: missing"):
            load_exported(folder)
        with pytest.raises(ValueError, match="not a folder that lowbit_ft wrote"):
            check_files(folder)
    weights = random_weights(source.empty_model(), int_grid())
    write_model(target, source, weights, EXPORTERS[name])
    assert [path.name for path in target.parent.iterdir()] == ["m"] and verify(target, weights).ok
    before = check_files(target)
    assert killed(source, target, name, "SIGKILL").returncode == -signal.SIGKILL
    assert check_files(target) == before and verify(target, weights).ok  # the whole one is still there


def test_ctrl_c_leaves_nothing_at_all(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = killed(source, tmp_path / "out" / "m", "gguf", "SIGTERM")
    assert done.returncode == -signal.SIGTERM
    weights = random_weights(source.empty_model(), int_grid())

    def stop(name: str) -> Any:
        raise KeyboardInterrupt

    specs = {name: LayerSpec.of(weight) for name, weight in weights.items()}
    for exporter in (EXPORTERS["gguf"], EXPORTERS["awq"]):
        with pytest.raises(KeyboardInterrupt):
            write_model(tmp_path / "out" / "m", source, Weights(specs, stop), exporter)
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["gptq", "gguf"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_an_error_of_one_line(
    name: str, code: int, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, target = random_weights(source.empty_model(), int_grid()), tmp_path / "out" / "m"

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(gguf_file, "_append", refuse)
    monkeypatch.setattr(shards, "tensor_bytes", refuse)
    with pytest.raises(
        ValueError, match=rf"{target}: could not be written .*{os.strerror(code)}.*nothing was left behind"
    ):
        write_model(target, source, weights, EXPORTERS[name])
    assert list(target.parent.iterdir()) == []


def test_a_place_that_is_no_folder_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    weights = random_weights(source.empty_model(), int_grid())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="could not be written"):
        write_model(tmp_path / "file" / "m", source, weights, EXPORTERS["gguf"])
    assert (tmp_path / "file").read_text() == "mine"
