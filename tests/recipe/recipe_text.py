"""A recipe that is right, and the ways in which tests make it wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
CHAT = ROOT / "recipes" / "assets" / "docstrings" / "train.jsonl"

# Line numbers below count in this text: keep one key per line.
GOOD = f"""\
name: test
model:
  path: {TINY}
  dtype: float32
  device: cpu
quant:
  bits: 4
  group_size: 128
adapter:
  method: lr_qat
  rank: 8
data:
  train:
    path: {CHAT}
    format: chat
  sequence_len: 256
train:
  max_steps: 10
  learning_rate: 1e-4
output: runs/test
"""


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def refused(text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The problems of a recipe that must be refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def problems_with(text: str, overrides: tuple[str, ...]) -> list[str]:
    """The problems of a recipe; none where it loads."""
    try:
        load_recipe(write(text), overrides)
    except RecipeError as error:
        return error.problems
    return []


def bad_recipes(rows: Sequence[tuple[str, Any, Any, str]]) -> pytest.MarkDecorator:
    """One test per row (what, (before, after) in GOOD, overrides, words of the problem)."""
    assert rows
    return pytest.mark.parametrize(
        ("change", "overrides", "words"), [row[1:] for row in rows], ids=[row[0] for row in rows]
    )


def refused_with(change: tuple[str, str], overrides: tuple[str, ...], words: str) -> None:
    """GOOD with a change is refused, and one of its problems has these words."""
    before, after = change
    assert before in GOOD
    problems = refused(GOOD.replace(before, after, 1) if before else GOOD, overrides)
    assert any(words in problem for problem in problems), "\n".join(problems)
