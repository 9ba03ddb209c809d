"""The JSON files of a run folder, edited by hand: each is one message that names the file, and the report
stands.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.files.records import Environment, Evaluation, PackedBase, TaskTable
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.report import plots
from lowbit_ft.report.page import write_report
from lowbit_ft.rundir import RunDir
from tests.report.made_up_run import files

BAD = {
    "null": b"null",
    "a list": b"[1]",
    "a list of null": b"[null]",
    "cut": b'{"rows": [{"stage": "ba',
    "deep": b"[" * 100_000,
    "deep and whole": b"[" * 500 + b"]" * 500,
    "half a character": rb'{"rows": [{"stage": "\ud800"}], "a": "\ud800"}',
    "a long number": b"9" * 5000,
    "a large number": b'{"rows": [{"stage": "base", "perplexity": 1' + b"0" * 400 + b"}]}",
    "rows of numbers": b'{"rows": [1, 2]}',
    "rows of lists": b'{"rows": {"stage": []}}',
    "lists as values": b'{"rows": [{"stage": ["a"], "perplexity": [1]}], "stage": {"a": [1]}}',
    "not UTF-8": b"\xff\xfe{}",
    "NaN": b'{"rows": [{"stage": "trained", "perplexity": NaN}], "scale_change": NaN, "x": Infinity}',
    "odd rows": b'[{"layer": [1], "action": {}, "error": "x", "stage": 5, "seconds": "x", "step": 1e300}]',
}
READ = [
    ("environment.json", Environment, Environment()),
    ("base.json", PackedBase, PackedBase()),
    ("evaluation.json", Evaluation, Evaluation()),
    ("tasks.json", TaskTable, TaskTable()),
]


DRAWN = {"metrics.jsonl", "quant.json", "moved.json", "stages.json"}  # what the figures are made of


@pytest.mark.parametrize("case", list(BAD))
def test_the_report_never_raises(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(path.name for path in _complete(tmp_path / "run").iterdir() if path.is_file())
    assert "recipe.yaml" in names and "metrics.jsonl" in names and len(names) >= 9
    assert DRAWN < set(names)
    for name in sorted(names, key=lambda name: name not in DRAWN):
        if name not in DRAWN:  # the figures are those of the whole run, and most of the time
            monkeypatch.setattr(plots, "svg", lambda figure: "<svg></svg>")
        run = _complete(tmp_path / name)
        (run / name).write_bytes(BAD[case])
        assert 'class="verdict' in write_report(run).read_text(encoding="utf-8"), name


def test_the_report_waits_for_no_pipe(tmp_path: Path) -> None:
    run = _complete(tmp_path / "run")
    for name in ("evaluation.json", "recipe.yaml", "metrics.jsonl", "tasks.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
    assert "got a pipe" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "shape", "default"), READ)
@pytest.mark.parametrize("case", ["null", "a list", "cut", "deep", "deep and whole"])
def test_a_file_of_another_shape_is_one_message(
    case: str, name: str, shape: Any, default: Any, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    assert run.read_json(name, shape, default) == default
    (tmp_path / name).write_bytes(BAD[case])
    with pytest.raises(ValueError, match=rf"{name.replace('.', chr(92) + '.')}: "):
        run.read_json(name, shape, default)


def test_a_stage_is_not_written_over_an_edited_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.stage("train", torch.device("cpu")):
        pass
    (tmp_path / "stages.json").write_text("[1]")
    with (
        pytest.raises(ValueError, match=r"stages\.json: 0: got 1; allowed: an object"),
        run.stage("train", torch.device("cpu"), resumable=True),
    ):
        pass
    assert (tmp_path / "stages.json").read_text() == "[1]"


@pytest.mark.usefixtures("in_the_repository")
def test_a_recipe_that_is_none_is_told_when_its_run_starts_again(tmp_path: Path) -> None:
    recipe = load_recipe("recipes/quickstart.yaml", [f"output={tmp_path / 'run'}"])
    RunDir.start(recipe).close()
    for content in (b"a: [", b"\xff", b"[" * 3000):
        (tmp_path / "run" / "recipe.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match=r"recipe\.yaml"):
            RunDir.start(recipe)
        with pytest.raises(RecipeError, match=r"recipe\.yaml"):
            RunDir(tmp_path / "run").recipe()


def _complete(folder: Path) -> Path:
    made = files()
    folder.mkdir()
    for name, content in made.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
