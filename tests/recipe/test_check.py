"""Checks of several sections at once, and what is only noted."""

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


def test_lora_is_noted_as_inexact():
    recipe = load_recipe(write(GOOD), ["adapter.method=lora"])
    assert any("does not merge exactly" in note for note in notes(recipe))


def test_a_start_that_text_beats_is_noted_at_two_and_three_bits():
    def said(*keys: str) -> list[str]:
        return [note for note in notes(load_recipe(write(GOOD), keys)) if "far worse start than gptq" in note]

    assert len(said("quant.bits=3", "quant.calibrate=mse")) == 1
    assert not said("quant.bits=4", "quant.calibrate=mse") and not said("quant.bits=2")
