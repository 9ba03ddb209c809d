"""What a rotation changes of what a plan counts: a head of its own, Hadamards before down_proj, refusals."""

from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.plan.model import skeleton
from lowbit_ft.plan.turned import folded
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rotations import OnlineHadamard
from tests.architectures import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "recipes" / "assets" / "tiny-llama"


def made(*overrides: str, folder: Path = TINY) -> Any:
    given = ["export.format=native", *overrides]
    return skeleton(load_recipe(ROOT / "recipes" / "quickstart.yaml", given, folders=[ROOT]), folder)


def test_a_tied_head_is_a_matrix_of_its_own_behind_r1(in_the_repository: None) -> None:
    before, after = made(), made("quant.rotation.kind=hadamard")
    assert before.held["head"] == 0 and after.held["head"] == after.held["embeddings"] > 0
    without = made("quant.rotation.kind=hadamard", "quant.rotation.sites.r1=false")
    assert without.held == before.held and sum(after.held.values()) > sum(before.held.values())


def test_r4_stands_before_down_proj(in_the_repository: None) -> None:
    blocks = made("quant.rotation.kind=adaptive", "quant.rotation.sites.r4=true").blocks
    layers = [block.module.mlp for block in blocks]
    assert layers and all(isinstance(mlp.down_proj.input_transform, OnlineHadamard) for mlp in layers)
    assert all(mlp.up_proj.input_transform is None for mlp in layers)


def test_what_cannot_be_turned_is_refused_before_anything_is_loaded(
    in_the_repository: None, tmp_path: Path
) -> None:
    CONFIGS["glm4"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="glm4: a norm with a gain"):
        made("quant.rotation.kind=hadamard", folder=tmp_path)


def test_the_line_of_the_plan_says_it(in_the_repository: None) -> None:
    recipe = load_recipe("recipes/quickstart.yaml", ["quant.rotation.kind=hadamard", "quant.smooth=0.5"])
    assert folded(recipe.quant) == ", rotation hadamard of r1, r2, smooth 0.5"
    assert folded(load_recipe("recipes/quickstart.yaml").quant) == ""
