"""What is accepted, and what is read into it."""

import shutil
from pathlib import Path

import pytest

from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import check_recipe, load_recipe
from tests.incoming_tools import quantized_checkpoint
from tests.recipe.recipe_text import (
    CHAT,
    GOOD,
    ROOT,
    write,
)


def test_good_recipe_and_its_defaults():
    recipe = load_recipe(write(GOOD))
    assert recipe.train.learning_rate == 1e-4  # text to PyYAML
    assert (recipe.quant.calibrate, recipe.quant.residual_bits, recipe.export.format) == (
        "gptq",
        4,
        "compressed-tensors",
    )
    assert recipe.adapter.method == "lr_qat" and recipe.output == Path("runs/test")
    assert check_recipe(recipe) == []
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 3


def test_yaml_round_trip_is_equal():
    recipe = load_recipe(write(GOOD), ["quant.overrides=[{match: '*.down_proj', bits: 8}]", "train.eps=1e-6"])
    again = load_recipe(write(recipe.to_yaml(), "again.yaml"))
    assert again == recipe and again.to_yaml() == recipe.to_yaml()


def test_numbers_written_as_text_and_unquoted_no():
    text = GOOD.replace("rank: 8", "rank: 1e1").replace(
        "max_steps: 10", "max_steps: 1e3\n  mixed_precision: no"
    )
    recipe = load_recipe(write(text))
    assert recipe.adapter.rank == 10 and recipe.train.max_steps == 1000  # type: ignore[attr-defined]
    assert recipe.train.mixed_precision == "no"


def test_overrides_reach_into_sections_lists_and_new_sections():
    recipe = load_recipe(
        write(GOOD),
        [
            "train.max_steps=7",
            "quant.overrides=[{match: '*.down_proj', bits: 8}]",
            "quant.overrides.0.bits=3",
            "eval.generate=['a b', c]",
            "adapter={method: scale}",
            "model.revision=",
        ],
    )
    assert recipe.train.max_steps == 7 and recipe.quant.overrides[0].bits == 3
    assert recipe.eval.generate == ["a b", "c"] and recipe.adapter.method == "scale"
    assert recipe.model.revision is None


def test_paths_beside_the_recipe_are_found(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(CHAT, folder / "rows.jsonl")
    recipe = load_recipe(write(GOOD.replace(str(CHAT), "rows.jsonl"), "elsewhere/r.yaml"))
    assert recipe.data.train.path == "elsewhere/rows.jsonl" or Path(recipe.data.train.path).is_file()


def test_hub_ids_pass_unchecked():
    recipe = load_recipe(
        write(GOOD), ["model.path=some-org/some-model", "data.train.path=some-org/some-data"]
    )
    assert any("hub id" in note for note in notes(recipe))


def test_every_shipped_recipe_is_valid(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(files) >= 6
    sparse = tmp_path / "sparse"  # what the first recipe of prune-once-for-all leaves for the second
    whole = {"source": ROOT / "recipes" / "assets" / "tiny-llama", "symmetric": True}
    quantized_checkpoint(sparse, "compressed-tensors", bits=8, group_size=-1, **whole)
    for file in files:
        behind = "prune-once-for-all-2" in file.name
        recipe = load_recipe(file, [f"model.path={sparse}"] if behind else [])
        assert recipe.name == file.stem and recipe.output == Path("runs") / file.stem
        text = file.read_text(encoding="utf-8")
        assert f"lowbit-ft run  recipes/{file.name}" in text or f"lowbit-ft run recipes/{file.name}" in text
        resolved = tmp_path / file.name
        resolved.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(resolved) == recipe
