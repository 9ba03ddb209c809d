"""The whole line of an encoder that learns from the layers of a teacher, at ternary weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from lowbit_ft import pipeline
from lowbit_ft.export.reader import read_weights
from lowbit_ft.plan.plan import plan
from lowbit_ft.recipe.recipe import load_recipe
from tests import encoders

LABELS = {"id2label": {0: "blue", 1: "red"}, "label2id": {"blue": 0, "red": 1}}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a head for the task."""
    folder = tmp_path_factory.mktemp("tuned")
    return encoders.encoder(folder, "bert", AutoModelForSequenceClassification, **LABELS)


def recipe_of(folder: Path, model: Path, teacher: str, **signal: Any) -> Path:
    rows = encoders.write(folder / "rows.jsonl", encoders.rows(24))
    train = {"signal": {"kind": "layers", **signal}, "teacher": teacher, "max_steps": 2}
    found = encoders.recipe(
        folder,
        model,
        "sequence_classification",
        rows,
        quant={"bits": 2, "group_size": -1, "calibrate": "ternary", "embeddings": 4},
        adapter={"method": "full_qat"},
        train=train,
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


def test_a_ternary_encoder_from_its_own_full_precision(tuned: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, tuned, str(tuned), intervention={"mode": "gradual"}))
    alone = load_recipe(
        recipe_of(tmp_path, tuned, str(tuned)), ["train.signal={kind: labels}", "train.teacher=null"]
    )
    maps, held = 8 * 16 * 16 * 2, 8 * 16 * 32  # of a layer's scores, and of a hidden state
    want = 2 * 4 * (2 * held + maps) + 4 * (4 * held + 2 * maps)
    costs = plan(recipe).parts["teacher"]
    assert "teacher" not in plan(alone).parts and want <= costs < 2 * want + 200_000
    pipeline.run(recipe)
    run = tmp_path / "run"
    measured = json.loads((run / "teacher.json").read_text())
    assert measured["kl"] < 0.01 * measured["student_kl"] and measured["windows"] == 24
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"logits_loss", "hidden_loss", "scores_loss", "outputs_loss"} <= lines[0].keys()
    weights = read_weights(run / "merged")
    layers = [name for name in weights if ".layer." in name]
    assert len(layers) == 12 and len(weights) == 13
    for name in layers:
        codes = weights[name].unpack_codes()
        assert int(codes.min()) == 1 and int(codes.max()) == 3 and not weights[name].grid.narrow


def test_a_teacher_whose_head_is_drawn_is_refused(tuned: Path, tmp_path: Path) -> None:
    bare = encoders.encoder(tmp_path / "bare", "bert")
    with pytest.raises(ValueError, match="has no head for this task .*classifier.*drawn at random"):
        pipeline.run(load_recipe(recipe_of(tmp_path, tuned, str(bare))))
