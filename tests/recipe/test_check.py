"""Checks of several sections at once, and what is only noted."""

import json
from pathlib import Path

from lowbit_ft.files.marker import MARKER, WRITER
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import GOOD, refused, write


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    problems = refused(GOOD, ("train.trackers=[wandb]", "eval.tasks=[arc_easy]"))
    assert any(
        "train.trackers.0: got 'wandb', which is not installed; run pip install wandb" in p for p in problems
    )
    missing = "eval.tasks.0: got 'arc_easy', but lm-eval is not installed; run pip install 'lowbit-ft[eval]'"
    assert any(missing in p for p in problems)


def test_existing_run_is_noted_not_refused():
    Path("runs/test").mkdir(parents=True)
    Path("runs/test/recipe.yaml").write_text(GOOD)
    Path("runs/test", MARKER).write_text(json.dumps({"writer": WRITER}))
    assert any("continued" in note for note in notes(load_recipe(write(GOOD))))


def test_lora_is_noted_as_inexact():
    recipe = load_recipe(write(GOOD), ["adapter.method=lora"])
    assert any("does not merge exactly" in note for note in notes(recipe))
