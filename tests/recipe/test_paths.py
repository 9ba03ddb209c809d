"""Where relative paths of a recipe are looked for."""

from __future__ import annotations

from pathlib import Path

from lowbit_ft.recipe.paths import located
from lowbit_ft.recipe.sections.model import AddTokensSection
from lowbit_ft.recipe.sections.train import TrainSection


def test_every_path_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    here = tmp_path / "recipes"  # the current folder is the one above
    for name in ("codec", "run", "teacher", "residual"):
        (here / name).mkdir(parents=True)
    tokens = AddTokensSection.model_validate({"audio": {"codec": "codec"}})
    found = located(tokens, (Path(), here))
    assert found.audio.codec == str(here / "codec")
    train = TrainSection.model_validate({"max_steps": 1, "start_from": "run", "teacher": "teacher"})
    found = located(train, (Path(), here))
    assert (found.start_from, found.teacher) == (str(here / "run"), str(here / "teacher"))
    residual = TrainSection.model_validate({"max_steps": 1, "teacher": "residual"})
    assert located(residual, (here,)) == residual, "a word of the recipe is no folder"
