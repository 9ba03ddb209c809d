"""Two runs with a hand-over: the second begins with what the first trained, unrounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from lowbit_ft import pipeline
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.train.setup import TrainError
from tests import encoders

LABELS = {"id2label": {0: "blue", 1: "red"}, "label2id": {"blue": 0, "red": 1}}
STILL = {"learning_rate": 1e-30, "scale_learning_rate": 1e-30, "modules_learning_rate": 1e-30}


def recipe(folder: Path, name: str, **train: Any) -> Path:
    """A ternary encoder; `name` is its output."""
    found = encoders.recipe(
        folder,
        folder / "model",
        "sequence_classification",
        str(folder / "rows.jsonl"),
        quant={"bits": 2, "group_size": -1, "calibrate": "ternary"},
        adapter={"method": "full_qat"},
        train={"learning_rate": 0.2, **train},
    )
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**found, "output": str(folder / name)}))
    return file


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with a first run in which the teacher intervened in all steps."""
    folder = tmp_path_factory.mktemp("two")
    encoders.encoder(folder / "model", "bert", AutoModelForSequenceClassification, **LABELS)
    encoders.write(folder / "rows.jsonl", encoders.rows(24))
    signal = {"kind": "layers", "intervention": {"mode": "gradual", "share": 1}}
    pipeline.run(load_recipe(recipe(folder, "one", signal=signal, teacher=str(folder / "model"))))
    return folder


def test_the_second_run_begins_where_the_first_ended(first: Path) -> None:
    """At rates of nothing its tensors are the first one's, bit for bit, and it is measured as that was; fresh
    adapters have others."""
    for name, start in (("two", {"start_from": str(first / "one")}), ("fresh", {})):
        pipeline.run(load_recipe(recipe(first, name, max_steps=1, **STILL, **start)))
    ours, theirs, fresh = (tensors(first, name) for name in ("two", "one", "fresh"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(not torch.equal(fresh[key], theirs[key]) for key in fresh)
    one, two = (json.loads((first / n / "evaluation.json").read_text())["rows"] for n in ("one", "two"))
    loss = {name: {row["stage"]: row["loss"] for row in rows} for name, rows in (("one", one), ("two", two))}
    assert loss["two"]["trained"] == loss["one"]["trained"] != loss["two"]["quantized"]


def test_a_resumed_run_has_the_same_start(first: Path) -> None:
    given = first / "given" / "adapter"
    shutil.copytree(first / "one" / "adapter", given)
    shutil.copy(first / "one" / "recipe.yaml", given.parent)
    path = recipe(first, "three", max_steps=1, start_from=str(given.parent))
    pipeline.train(load_recipe(path))
    shutil.rmtree(given)
    pipeline.train(load_recipe(recipe(first, "other", max_steps=1)))
    shutil.copytree(first / "other" / "adapter", given)
    with pytest.raises(TrainError, match="start was '[0-9a-f]{64}' and is '[0-9a-f]{64}'"):
        pipeline.train(load_recipe(path))


def test_what_does_not_fit_is_refused(first: Path) -> None:
    start = {"start_from": str(first / "one")}
    with pytest.raises(RecipeError, match=r"train.start_from: got .*nothing.*has no adapter/ of a run"):
        load_recipe(recipe(first, "four", start_from=str(first / "nothing")))
    with pytest.raises(RecipeError, match="the output of this recipe"):
        load_recipe(recipe(first, "one", **start))
    with pytest.raises(ValueError, match="trained on the packed base"):
        pipeline.train(load_recipe(recipe(first, "five", **start), ["quant.calibrate=mse"]))
    swapped = [
        "task={kind: sequence_classification, labels: [red, blue]}"
    ]  # the same shapes and the same base, another meaning
    with pytest.raises(
        ValueError, match=r"task.labels: blue, red in .*one \(train.start_from\), red, blue here"
    ):
        pipeline.train(load_recipe(recipe(first, "swapped", **start), swapped))
    assert not (first / "swapped" / "base").exists(), "told before anything is packed"
    shutil.copytree(first / "one" / "adapter", first / "alone" / "adapter")
    with pytest.raises(ValueError, match="has no recipe.yaml"):
        pipeline.train(load_recipe(recipe(first, "seven", start_from=str(first / "alone"))))
    with pytest.raises(
        ValueError, match="trained by another adapter.*method 'full_qat' there, 'lr_qat' here"
    ):
        pipeline.train(
            load_recipe(recipe(first, "six", **start), ["adapter={method: lr_qat, rank: 4, alpha: 8}"])
        )
