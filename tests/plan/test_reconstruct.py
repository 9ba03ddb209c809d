"""What plan says of adapters that are fitted before training."""

from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.plan.model import PARTS
from lowbit_ft.plan.plan import Card, plan
from lowbit_ft.plan.reconstruct import reconstruct_tokens
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "recipes" / "quickstart.yaml"
CPU = Card(1 << 50, "a CPU", 0)


def test_reconstruct_is_a_stage_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with its micro-batch and holds no optimizer of the whole model; with no step of training there
    is no training to fit, and no checkpoint on the disk."""
    monkeypatch.chdir(ROOT)

    def made(*changes: str) -> Any:
        found = plan(load_recipe(QUICK, ["eval.perplexity=false", *changes], check=False), card=CPU)
        assert found is not None
        return found

    plain, fitted = made(), made("train.reconstruct={}")
    assert "reconstructing" not in plain.stages and fitted.stages["training"] == plain.stages["training"]
    small = made("train.reconstruct={micro_batch_size: 2}")
    held = sum(fitted.parts[part] for part in PARTS) + fitted.parts["context"]
    assert held < small.stages["reconstructing"] < fitted.stages["reconstructing"]
    assert fitted.needs.disk["reconstruct/"] == 4 * fitted.trainable
    alone = made("train.reconstruct={}", "train.max_steps=0", "train.eval_every=null")
    assert set(alone.stages) == {"reconstructing", "quantizing"} and alone.needs.steps == 0
    way = "train.gradient={kind: zeroth_order}"
    still = made(way, "train.reconstruct={}", "train.max_steps=0", "train.eval_every=null")
    assert still.notes == alone.notes and made(way).notes != plain.notes, "no step of it is taken"
    assert alone.total == max(alone.stages.values()) and "checkpoints/" not in alone.needs.disk
    other = made("train.reconstruct={steps: 100, samples: 24, sequence_len: 64}").recipe
    assert reconstruct_tokens(other) == 100 * 8 * 64 + 7 * 24 * 64 // 3
    assert reconstruct_tokens(plain.recipe) == 0
