"""`lowbit-ft init` writes a recipe that loads."""

import shutil
from pathlib import Path

import pytest

from lowbit_ft.cli.init import write_recipe
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import (
    CHAT,
    TINY,
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_init_writes_a_recipe_that_loads():
    write_recipe(str(TINY), Path("new.yaml"))
    recipe = load_recipe("new.yaml", [f"data.train.path={CHAT}"])
    assert recipe.quant.group_size == 128 and recipe.data.sequence_len == 1024
    assert recipe.data.train.format == "chat" and recipe.model.path == str(TINY)
    before = Path("new.yaml").read_bytes()
    with pytest.raises(ValueError, match="exists; nothing was written"):
        write_recipe(str(TINY), Path("new.yaml"))
    assert Path("new.yaml").read_bytes() == before
    write_recipe("some-org/3-B", Path("new.yaml"), force=True)
    assert load_recipe("new.yaml", [f"data.train.path={CHAT}"]).model.path == "some-org/3-B"
    with pytest.raises(ValueError, match="no such folder"):
        write_recipe("./nothing", Path("other.yaml"))
    assert sorted(p.name for p in Path().iterdir()) == ["new.yaml"]


def test_init_of_an_odd_path_stays_yaml(tmp_path):
    folder = tmp_path / "my: model #1"
    shutil.copytree(TINY, folder)
    write_recipe(str(folder), Path("odd.yaml"))
    assert load_recipe("odd.yaml", [f"data.train.path={CHAT}"]).model.path == str(folder)
