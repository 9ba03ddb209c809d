"""The commands on a run folder work from every folder, and write the same bytes from each.

A recipe names its checkpoint and data from where the run was started. Here that is a project folder; the
commands are called from another one, which has a `model` and a `rows.jsonl` of its own that must not be
taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowbit_ft.cli import main as cli
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rundir import RunDir
from lowbit_ft.session import resume

ASSETS = Path(__file__).resolve().parents[2] / "recipes" / "assets"
RECIPE = """\
name: near
model: {path: model, dtype: float32, device: cpu}
quant: {group_size: 64}
adapter: {method: lr_qat, rank: 2}
data:
  train: {path: rows.jsonl, format: chat, limit: 40}
  valid: {path: rows.jsonl, format: chat, limit: 8}
  sequence_len: 64
train: {max_steps: 1, micro_batch_size: 1, gradient_accumulation_steps: 1}
eval: {windows: 2, window: 64}
output: runs/near
"""


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, rows, a recipe that names both from there, and its finished run."""
    folder = tmp_path_factory.mktemp("here") / "project"
    folder.mkdir()
    shutil.copytree(ASSETS / "tiny-llama", folder / "model")
    shutil.copyfile(ASSETS / "docstrings" / "train.jsonl", folder / "rows.jsonl")
    (folder / "near.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("run", "near.yaml") == 0
    yield folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: it has other things of the same names."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("no row\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shipped(run: Path) -> dict[str, bytes]:
    """The files of merged/ and exported/."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for name in ("merged", "exported")
        for file in sorted((run / name).rglob("*"))
        if file.is_file()
    }


def test_commands_from_another_folder_write_the_same_bytes(
    project: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = project / "runs" / "near"
    before, card = shipped(run), (run / "exported" / "README.md").read_text()
    assert "path: model\n" in card and "output: runs/near\n" in card
    assert json.loads((run / "exported" / "lowbit_ft.json").read_text())["source"]["path"] == "model"
    for command in ("export", "merge", "eval", "report"):
        assert call(command, str(run)) == 0, capsys.readouterr().err
    assert call("verify", str(run / "exported")) == 0, capsys.readouterr().err
    assert shipped(run) == before
    assert call("generate", str(run), "Say hello.", "-n", "2", "--device", "cpu") == 0
    shutil.rmtree(run / "merged")
    assert call("merge", str(run)) == 0 and shipped(run) == before
    assert not (elsewhere / "runs").exists()


def test_paths_are_those_of_the_folder_where_the_run_was_started(project: Path, elsewhere: Path) -> None:
    run = RunDir(project / "runs" / "near")
    here = run.recipe_here()
    assert here.model.path == str(project / "model") and here.output == run.path
    assert here.data.train.path == str(project / "rows.jsonl") == getattr(here.data.valid, "path", None)
    given = run.recipe()
    assert (given.model.path, given.data.train.path, str(given.output)) == (
        "model",
        "rows.jsonl",
        "runs/near",
    )
    assert given.to_yaml() == (run / "recipe.yaml").read_text()


def test_in_the_folder_of_the_start_paths_stay_short(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert RunDir(Path("runs/near")).recipe_here() == load_recipe("near.yaml")


def test_a_run_that_was_moved(
    project: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its project: paths are where they lie from the run. Alone: the project is where it was, else the
    current folder is tried, and what is nowhere is told with all places.
    """
    moved = elsewhere / "moved"
    shutil.copytree(project, moved)
    gone = json.loads((moved / "runs" / "near" / "started.json").read_text()) | {"folder": "/no/such/folder"}
    (moved / "runs" / "near" / "started.json").write_text(json.dumps(gone))
    assert RunDir(moved / "runs" / "near").recipe_here().model.path == str(moved / "model")

    alone = elsewhere / "alone"
    shutil.copytree(project / "runs" / "near", alone)
    assert RunDir(alone).recipe_here().model.path == str(project / "model")
    (alone / "started.json").write_text(json.dumps(gone))
    assert RunDir(alone).recipe_here().model.path == "model"
    monkeypatch.chdir(project)
    assert resume(alone).checkpoint.folder == (project / "model").resolve()
    monkeypatch.chdir(alone)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (alone / "recipe.yaml").write_text(
        (alone / "recipe.yaml").read_text().replace("path: model", "path: ./a/b")
    )
    with pytest.raises(ValueError) as caught:
        resume(alone)
    words = str(caught.value)
    assert "./a/b: no such folder" in words and "/no/such/folder" in words and str(alone) in words
    assert f"set model.path in {alone / 'recipe.yaml'}" in words
