"""How a command begins: the checked recipe, what is said of it, and whether it can fit at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe


def waking() -> None:
    """A line before the libraries are imported, which is silent and takes seconds, on a slow disk half a
    minute."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        typer.echo("loading torch and transformers ...")
        sys.stdout.flush()


def load(path: Path, overrides: list[str] | None, weights: bool = True) -> Recipe:
    """The checked recipe; what is worth knowing goes to standard error. weights: the model's files must be
    there, not only its config.json. ValueError when another run is in its output folder (a plan, which does
    without weights, is shown all the same)."""
    from ..recipe.check import notes  # slow: torch; --help does without
    from ..recipe.recipe import load_recipe  # slow: torch; --help does without
    from ..recipe.yaml import RecipeError  # slow: torch; --help does without
    from .plan_checks import existing  # as above

    try:
        recipe = load_recipe(path, overrides or [])
    except RecipeError as error:
        if weights or not all("no model.safetensors" in problem for problem in error.problems):
            raise
        return load_recipe(path, overrides or [], check=False)
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
        held, refused = existing(recipe)
        if refused is not None and weights:
            raise ValueError(refused)
        for note in [*([held] if held else []), *notes(recipe)]:
            typer.echo(f"note: {note}", err=True)
    return recipe


def refuse_what_cannot_fit(recipe: Recipe, anyway: bool) -> None:
    """ValueError, before anything is read, for a run that plan says has no place on the device it would
    take.
    """
    if anyway:
        return
    from .refusal import refusal  # slow: torch; --help does without

    if reason := refusal(recipe):
        raise ValueError(reason)
