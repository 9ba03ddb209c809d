"""docs/full-qat.md: its keys are those of the method, its products those that are counted."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.ef_qat import EfQATConfig
from lowbit_ft.adapters.full_qat import FullQATConfig
from lowbit_ft.grid import IntGrid

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "full-qat.md").read_text(encoding="utf-8")


def test_its_recipe_is_one_and_says_the_defaults() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    config = ADAPTERS["ef_qat"].model_validate(yaml.safe_load(block)["adapter"])
    assert config == EfQATConfig()


def test_its_products_are_those_of_the_code() -> None:
    grid, found = (
        IntGrid(group_size=-1),
        re.findall(r"^\| `ef_qat`, `share: ([\d.]+)` \| ([\d.]+) \|", PAGE, re.M),
    )
    assert len(found) == 3
    for share, products in found:
        assert 2 + EfQATConfig(share=float(share)).gradient_cost(grid) == float(products)
    assert re.search(rf"^\| `full_qat` \| {2 + FullQATConfig().gradient_cost(grid):g} \|", PAGE, re.M)
