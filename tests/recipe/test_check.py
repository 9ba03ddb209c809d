"""Checks of several sections at once, and what is only noted."""

from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import GOOD, refused, write


def test_packages_that_are_not_installed(monkeypatch):
    load_recipe(write(GOOD))  # imports transformers while there are packages, also where this file runs alone
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    problems = refused(GOOD, ("train.trackers=[wandb]", "eval.tasks=[arc_easy]"))
    assert any(
        "train.trackers.0: got 'wandb', which is not installed; run pip install wandb" in p for p in problems
    )
    missing = "eval.tasks.0: got 'arc_easy', but lm-eval is not installed; run pip install 'lowbit-ft[eval]'"
    assert any(missing in p for p in problems)


def test_lora_is_noted_as_inexact():
    recipe = load_recipe(write(GOOD), ["adapter.method=lora"])
    assert any("does not merge exactly" in note for note in notes(recipe))


def test_a_start_that_text_beats_is_noted_at_two_and_three_bits():
    def said(*keys: str) -> list[str]:
        return [note for note in notes(load_recipe(write(GOOD), keys)) if "far worse start than gptq" in note]

    assert len(said("quant.bits=3", "quant.calibrate=mse")) == 1
    assert not said("quant.bits=4", "quant.calibrate=mse") and not said("quant.bits=2")


def test_a_wrong_key_does_not_hide_a_missing_file_of_its_section():
    """Whatever is wrong beside it; and of what a default then stands for, nothing is said."""
    valid = "data.valid={path: nowhere.jsonl, format: chat}"
    for wrong in (
        "data.synthesis={kind: task_labels, prompt: x, lables: [a]}",
        "data.packing=perhaps",
        "data.trian.path=x",
    ):
        problems = refused(GOOD, (wrong, valid))
        assert any("data.valid.path: got 'nowhere.jsonl'; there is no such file" in p for p in problems), (
            wrong
        )
        assert len(problems) == 2, problems
    problems = refused(GOOD, ("model.pahts=x", "model.path=./nowhere/a/model", "train.max_stpes=3"))
    assert [("unknown key" in p, "nowhere/a/model" in p) for p in problems].count((False, True)) == 1
    assert len(problems) == 3, problems
    only = refused(
        GOOD.replace("  train:\n", "  trian:\n"), ("data.valid={path: nowhere.jsonl, format: chat}",)
    )
    assert len(only) == 2 and "did you mean 'train'" in only[0], "and not that rows are missing"


def test_a_folder_of_files_that_rows_name():
    problems = refused(GOOD, ("data.train.media_dir=nowhere/pictures",))
    assert any("media_dir: got 'nowhere/pictures'; there is no such folder" in p for p in problems)
    assert any("with task: causal_lm, whose rows name no files; remove it" in p for p in problems)
