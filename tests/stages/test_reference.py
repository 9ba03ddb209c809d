"""A whole run that learns from pairs: the reference is asked once, kept, and read when the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit_ft import pipeline
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.signals import reference
from tests.family_rows import ASSETS, recipe_file

ROWS = {name: str(ASSETS / "preferences" / f"{name}.jsonl") for name in ("train", "valid")}
CHANGES: dict[str, Any] = {
    "data.train": {"path": ROWS["train"], "format": "preference", "limit": 6},
    "data.valid": {"path": ROWS["valid"], "format": "preference", "limit": 2},
    "data.sequence_len": 256,
    "quant.targets": ["*.layers.0.mlp.*"],
    "train.signal": {"kind": "dpo", "reference": "cached"},
    "train.keep_best": True,
    "train.eval_every": 1,
}


def test_a_run_of_pairs(tmp_path: Path, monkeypatch: Any) -> None:
    asked = []
    plain = reference.StepReference.say
    monkeypatch.setattr(reference.StepReference, "say", lambda self, ask: asked.append(1) or plain(self, ask))
    recipe = load_recipe(recipe_file(tmp_path, CHANGES))
    pipeline.train(recipe)
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [round(line["loss"], 4) for line in lines if "loss" in line][0] == 0.6931
    assert all("valid_rewards/accuracies" in line for line in lines if "valid_loss" in line)
    kept = {path: path.read_bytes() for path in (folder / "reference").rglob("*.safetensors")}
    assert len(kept) == 2 and asked
    asked.clear()
    pipeline.train(recipe)
    assert not asked, "what was kept is read"
