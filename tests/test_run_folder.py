"""The folder of a run: what is in it is read only when it is whole and this run's, and what is not of a run
is never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowbit_ft import pipeline
from lowbit_ft.cli import main as cli
from lowbit_ft.files import tensorfile
from lowbit_ft.files.errors import FileError
from lowbit_ft.integrations.adapter_files import read_adapter, write_adapter
from lowbit_ft.rundir import RunDir
from lowbit_ft.stages import train as train_stages
from tests.line_tools import QUICK, ROOT, recipe
from tests.processes import environment

pytestmark = pytest.mark.usefixtures("in_the_repository")

SHORT = ("train.max_steps=2", "eval.kl=false", "eval.generate=[]", "eval.windows=1")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    return int(caught.value.code or 0), capsys.readouterr().err


def line(*more: object) -> list[str]:
    return ["run", "recipes/quickstart.yaml", *QUICK, *SHORT, *map(str, more)]


def adapter_sha(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        pipeline.run(recipe(out, *SHORT))
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Of the finished run; no copy of its checkpoints, which are not what is tested."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


# ------------------------------------------------------------------------------------ what is read is whole


def flip(path: Path, place: int = -1000) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def another_adapter(run: Path) -> None:
    """One of another run on the same base: whole, with a manifest of its own."""
    config, state, digest = read_adapter(run / "adapter")
    moved = {name: tensor * 2 for name, tensor in state.items()}
    write_adapter(run / "adapter", moved, config, digest, run / "base")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "base": (
        lambda run: flip(run / "base" / "model.safetensors"),
        "base: model.safetensors: its content is not the one that was written",
        ("eval", "merge"),
    ),
    "adapter": (
        lambda run: flip(run / "adapter" / "adapter_model.safetensors"),
        "adapter: adapter_model.safetensors: its content is not the one that was written",
        ("eval", "merge"),
    ),
    "its configuration": (
        lambda run: flip(run / "adapter" / "adapter_config.json", -5),
        "adapter: adapter_config.json: its content is not the one that was written",
        ("eval", "merge"),
    ),
    "another adapter": (
        another_adapter,
        "adapter: its lowbit_ft.json is of other tensors than this run wrote there",
        ("eval", "merge"),
    ),
    "merged": (
        lambda run: flip(run / "merged" / "model.safetensors"),
        "merged: model.safetensors: its content is not the one that was written",
        ("export", "eval", "verify", "merge", "generate merged"),
    ),
    "exported": (
        lambda run: flip(run / "exported" / "model.safetensors"),
        "exported: model.safetensors: its content is not the one that was written",
        ("eval", "verify", "generate", "generate exported", "serve"),
    ),
    "its tokenizer": (
        lambda run: flip(run / "exported" / "tokenizer.json", -20),
        "exported: tokenizer.json: its content is not the one that was written",
        ("generate", "eval"),
    ),
    "a manifest": (
        lambda run: flip(run / "exported" / "lowbit_ft.json", 300),
        "lowbit_ft.json: ",
        ("eval", "verify", "generate", "generate exported"),
    ),
    "no manifest": (
        lambda run: (run / "exported" / "lowbit_ft.json").unlink(),
        "lowbit_ft.json: missing",
        ("eval", "verify", "generate"),
    ),
}


def command(words: str, run: Path) -> list[object]:
    name, _, folder = words.partition(" ")
    more: dict[str, list[object]] = {"generate": ["hi", "-n", "1"], "verify": []}
    return [name, run / (folder or ("exported" if name == "verify" else "")), *more.get(name, [])]


@pytest.mark.parametrize("what", DAMAGE)
def test_what_ships_measures_or_answers_is_checked(
    what: str, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit_ft.cli.serve.NEEDS", ())
    damage, said, commands = DAMAGE[what]
    damage(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name[0] != "."}
    for words in commands:
        code, error = call(capsys, *command(words, copy))
        assert code == 2 and error.startswith("error: ") and said in error, (words, error)
    if what in ("base", "adapter", "merged", "exported"):
        assert "run the line again" in error and "sha256" in error
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_run_moved_or_copied_is_whole(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "generate", copy, "hi", "-n", "1")[0] == 0
    assert call(capsys, "merge", copy)[0] == 0


# ------------------------------------------------------------------------------------ what is not ours stays


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_with_a_recipe_is_not_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        (ROOT / "recipes" / "quickstart.yaml").read_text().replace("recipes/assets", f"{ROOT}/recipes/assets")
    )
    made = recipe(tmp_path).model_copy(update={"output": tmp_path})
    (tmp_path / "recipe.yaml").write_text(f"# a comment\n{text}")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    code, error = call(capsys, "run", "recipe.yaml", *QUICK, "output=.")
    assert code == 2 and "output" in error and contents(tmp_path) == before
    (tmp_path / "metrics.jsonl").write_text("mine")
    (tmp_path / "environment.json").write_text("[]")
    (tmp_path / "started.json").write_text('{"folder": "/", "from_here": "."}')
    before = contents(tmp_path)
    for start in (RunDir.start, pipeline.quantize):  # who comes without the check of the recipe
        with pytest.raises(ValueError, match="holds no run .* nothing of it is overwritten"):
            start(made)
    for words in ("report", "eval", "merge", "export"):
        code, error = call(capsys, words, tmp_path)
        assert code == 2, (words, error)
    assert contents(tmp_path) == before


def test_plan_fit_does_not_write_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    fit = ["plan", "recipes/quickstart.yaml", "--no-search", "--fit", notes]
    code, error = call(capsys, *fit)
    assert code == 2 and f"{notes} exists; nothing was written" in error and notes.read_text() == "mine"
    assert call(capsys, *fit, "--force")[0] == 0 and "lowbit-ft plan --fit" in notes.read_text()


def test_files_put_into_a_run_stay(copy: Path, tmp_path: Path) -> None:
    hidden = (".adapter.partial", ".base.replaced", ".merged.removed")
    for name in hidden:
        (copy / name).mkdir()
        (copy / name / "x").write_text("mine")
    (copy / "exported.refused").mkdir()
    (copy / "exported.refused" / "x").write_text("mine")
    (copy / "base" / "notes.txt").write_text("mine")
    flip(copy / "base" / "model.safetensors")
    pipeline.run(recipe(copy, *SHORT))
    for name in (*hidden, "exported.refused"):
        assert (copy / name / "x").read_text() == "mine"
    assert (copy / "base.damaged" / "notes.txt").read_text() == "mine"
    assert not (copy / "base" / "notes.txt").exists()
    (copy / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"adapter: exists and holds what lowbit_ft did not write .*notes\.txt"
    ):
        another_adapter(copy)


# ------------------------------------------------------------------------------------ files that change


def changes(out: Path, how: str) -> None:
    file = out / "base" / "model.safetensors"
    if how == "deleted":
        shutil.rmtree(out / "base")
    elif how == "another in its place":
        shutil.copyfile(file, file.with_name("other"))
        os.replace(file.with_name("other"), file)
    elif how == "written to":
        with file.open("r+b") as handle:
            handle.seek(-8, os.SEEK_END)
            handle.write(b"\0" * 8)
    else:
        shutil.rmtree(out)
        out.mkdir()


@pytest.mark.parametrize("how", ["deleted", "another in its place", "written to", "folder made anew"])
def test_a_base_that_changes_while_it_trains_ends_the_run_at_that_step(
    how: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real = train_stages.begin_step

    def begin(model: object, step: int) -> None:
        real(model, step)  # type: ignore[arg-type]
        if step == 1:
            changes(out, how)

    with monkeypatch.context() as patch:
        patch.setattr(train_stages, "begin_step", begin)
        with pytest.raises(FileError, match=r"by another program while|deleted or replaced while"):
            pipeline.train(recipe(out, *SHORT))
    assert not (out / "adapter").exists() and not (out / "checkpoints" / "step-00000002").exists()
    pipeline.train(recipe(out, *SHORT))
    assert adapter_sha(out) == adapter_sha(finished)


CUT = """
import os, sys
from lowbit_ft.cli.main import main
from lowbit_ft.stages import train
real = train.begin_step
def begin(model, step):
    real(model, step)
    if step == 1:
        os.truncate(sys.argv[-1].partition("=")[2] + "/base/model.safetensors", 4096)
train.begin_step = begin
main(sys.argv[1:])
"""


def test_a_base_that_is_cut_while_it_trains_is_said_after_the_bus_error(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", CUT, *line(f"output={tmp_path / 'run'}")]
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and not (tmp_path / "run" / "adapter").exists()
    assert "base/model.safetensors: was " in done.stderr and "Run the line again" in done.stderr


# ------------------------------------------------------------------------------------ a full disk


def test_a_disk_that_fills_while_a_checkpoint_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensorfile, "save_file", full)
    code, error = call(capsys, *line(f"output={tmp_path / 'run'}"))
    assert (
        code == 2 and "checkpoints/" in error and "No space left on device" in error and "Make room" in error
    )
    assert "Traceback" not in error and list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_what_a_run_made_is_noted(finished: Path) -> None:
    noted = json.loads((finished / "made.json").read_text())
    assert sorted(noted) == ["adapter", "base", "exported", "merged"] and len(set(noted.values())) == 4
    assert json.loads((finished / "started.json").read_text())["writer"] == "lowbit_ft"
    assert all(
        torch.isfinite(t).all() for t in load_file(finished / "adapter/adapter_model.safetensors").values()
    )
