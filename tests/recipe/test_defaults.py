"""auto: what it becomes, that the resolved recipe says so, and that a number of one's own stays."""

from pathlib import Path

import pytest
import yaml

from lowbit_ft.adapters.rates import OTHERS, RATES
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.defaults import settled, taken
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from tests.incoming_tools import quantized_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def recipe(tmp_path: Path, quant: dict, adapter: dict, train: dict) -> Recipe:
    """A user's recipe that says little: bits and a method."""
    assets = ROOT / "recipes" / "assets"
    values = {
        "name": "r",
        "model": {"path": str(assets / "tiny-llama"), "device": "cpu"},
        "quant": quant,
        "adapter": adapter,
        "data": {
            "train": {"path": str(assets / "docstrings" / "train.jsonl"), "format": "chat"},
            "sequence_len": 128,
        },
        "train": {"max_steps": 3, **train},
        "export": {"format": "native"},
        "output": str(tmp_path / "run"),
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_recipe(file)


@pytest.mark.parametrize("method", ["lr_qat", "dl_qat", "l4q", "scale", "lora"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_bits_and_method_are_enough(method: str, bits: int, tmp_path: Path):
    got = recipe(tmp_path, {"bits": bits, "group_size": 64}, {"method": method}, {})
    assert got.quant.calibrate == ("mse" if bits > 4 else "gptq")
    four = RATES.get(method, {}).get(4, OTHERS)
    expected = (four + OTHERS) / 2 if bits == 6 else RATES.get(method, {}).get(bits, OTHERS)
    assert got.train.learning_rate == expected
    said = taken(got)
    assert len(said) == 2 and f"quant.calibrate: {got.quant.calibrate}" in said[0]
    assert f"train.learning_rate: {got.train.learning_rate:g}" in said[1]
    if bits <= 4:
        assert "docstrings" in said[0], "what it looks at"
    # What the run folder keeps: numbers and names, and nothing is auto any more.
    kept = tmp_path / "kept.yaml"
    kept.write_text(got.to_yaml())
    again = load_recipe(kept)
    assert again == got and "auto" not in (again.quant.calibrate, again.train.learning_rate)
    assert taken(again) == []


def test_what_is_written_stays(tmp_path: Path):
    got = recipe(tmp_path, {"bits": 3, "calibrate": "mse"}, {"method": "lr_qat"}, {"learning_rate": "2e-4"})
    assert (got.quant.calibrate, got.train.learning_rate, taken(got)) == ("mse", 2e-4, [])
    got = recipe(tmp_path, {"bits": 3, "calibrate": "auto"}, {"method": "dl_qat"}, {"learning_rate": "auto"})
    assert (got.quant.calibrate, got.train.learning_rate) == ("gptq", RATES["dl_qat"][3])
    assert len(taken(got)) == 2, "auto that is written is auto"


def test_planes_start_by_greedy(tmp_path: Path):
    got = recipe(tmp_path, {"grid": "binary", "bits": 3}, {"method": "alpha_tuning"}, {})
    assert got.quant.calibrate == "greedy" and got.train.learning_rate == OTHERS


def test_a_checkpoint_that_comes_later_decides_the_rate_too(tmp_path: Path):
    """A hub id: what it is quantized to is known once it is fetched."""
    quantized_checkpoint(tmp_path / "model", "gptq", source=ROOT / "recipes/assets/tiny-llama", bits=2)
    file = tmp_path / "r.yaml"
    text = {
        "name": "r",
        "model": {"path": str(tmp_path / "model"), "device": "cpu"},
        "adapter": {"method": "dl_qat"},
        "data": {"train": {"path": "rows.jsonl", "format": "text"}},
        "train": {"max_steps": 3},
        "output": str(tmp_path / "run"),
    }
    file.write_text(yaml.safe_dump(text))
    before = load_recipe(file, check=False, folders=())  # nobody has looked at the checkpoint
    assert (before.quant.bits, before.quant.calibrate, before.train.learning_rate) == (4, "gptq", OTHERS)
    found, against = settled(before)
    assert not against and found == load_recipe(file, check=False)
    assert (found.quant.bits, found.quant.calibrate) == (2, "from_checkpoint")
    assert found.train.learning_rate == RATES["dl_qat"][2] != OTHERS
    own = load_recipe(file, ["train.learning_rate=3e-4"], check=False, folders=())
    assert settled(own)[0].train.learning_rate == 3e-4


def test_a_recipe_made_in_python_is_settled_as_one_of_a_file(tmp_path: Path):
    got = recipe(tmp_path, {"bits": 3}, {"method": "lr_qat"}, {})
    by_hand = got.model_copy(
        update={
            "quant": QuantSection.model_validate({"bits": 3}),
            "train": TrainSection.model_validate({"max_steps": 3}),
        }
    )
    assert (by_hand.quant.calibrate, by_hand.train.learning_rate) == ("auto", "auto")
    assert settled(by_hand) == (got, [])


def test_lengths_that_are_not_said_fit_the_model(tmp_path: Path):
    """The tiny Llama has 1024 positions, a window is 2048 tokens where nobody says otherwise."""
    file = tmp_path / "r.yaml"
    recipe(tmp_path, {"bits": 3, "group_size": 64}, {"method": "lr_qat"}, {"reconstruct": {}})
    values = yaml.safe_load(file.read_text())
    del values["data"]["sequence_len"]
    file.write_text(yaml.safe_dump(values))
    got = load_recipe(file)
    assert got.data.sequence_len == 1024
    assert got.quant.calibration.sequence_len == 512 and got.train.reconstruct is not None
    assert got.train.reconstruct.sequence_len == 512, "below what the model has: left as it is"
    assert any("measured on the training rows" in note for note in notes(got)), "it has no data.valid"
    assert taken(got)[-1] == "data.sequence_len: 1024 (all positions that the model has)"


@pytest.mark.parametrize(
    "change",
    ["data.sequence_len=2048", "quant.calibration.sequence_len=2048", "train.reconstruct.sequence_len=2048"],
)
def test_lengths_that_are_said_are_refused(tmp_path: Path, change: str):
    recipe(tmp_path, {"bits": 3, "group_size": 64}, {"method": "lr_qat"}, {"reconstruct": {}})
    key = change.partition("=")[0]
    with pytest.raises(ValueError, match=f"{key}: got 2048; allowed: at most the 1024 positions"):
        load_recipe(tmp_path / "r.yaml", [change])


def test_rows_that_the_model_writes_are_looked_at(tmp_path: Path):
    recipe(tmp_path, {"bits": 3, "group_size": 64}, {"method": "lr_qat"}, {})
    got = load_recipe(tmp_path / "r.yaml", ["data.train=null", "data.synthesis={kind: self_generated}"])
    assert got.quant.calibrate == "gptq" and "rows of data.synthesis" in taken(got)[0]
