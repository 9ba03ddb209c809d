"""Prune Once for All: an encoder that is pruned while it trains, and then a classifier with its zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForMaskedLM

from lowbit_ft import pipeline
from lowbit_ft.activations.place import scheme_of
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.model.linear import PackedEmbedding, PackedLinear
from lowbit_ft.recipe.recipe import load_recipe
from tests import encoders

GROWING = {"kind": "magnitude", "amount": 0.75, "schedule": {"end": 0.4, "every": 1}}


def recipe(folder: Path, name: str, model: str, task: str, **changes: Any) -> Path:
    rows = str(folder / "rows.jsonl")
    found = encoders.recipe(folder, folder / model, task, rows, adapter={"method": "full_qat"}, **changes)
    found["output"] = str(folder / name)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    encoders.encoder(folder / "A", auto=AutoModelForMaskedLM, num_hidden_layers=1)
    rows = encoders.write(folder / "rows.jsonl", encoders.rows(32))
    text = {"path": rows, "format": "text"}
    first = recipe(
        folder,
        "B",
        "A",
        "masked_lm",
        quant={"bits": 8, "group_size": -1, "calibrate": "absmax", "sparsity": GROWING},
        data={"train": text, "valid": text},
        train={"max_steps": 4, "eval_every": 1, "keep_best": True, "learning_rate": 0.5},
        export={"format": "compressed-tensors"},
    )
    pipeline.run(load_recipe(first))
    second = recipe(folder, "C", "B/exported", "sequence_classification", train={"learning_rate": 0.5})
    inputs = {"kind": "tensor", "bits": 8, "symmetric": False, "dynamic": False}
    found = yaml.safe_load(second.read_text())
    found["quant"] = {"sparsity": {"kind": "locked"}, "embeddings": 8, "activations": inputs}
    found["data"]["valid"] = {"path": rows}
    second.write_text(yaml.safe_dump(found))
    pipeline.run(load_recipe(second))
    return folder


def test_what_became_zero_ships_and_is_told(chain: Path) -> None:
    told = json.loads((chain / "B" / "zeros.json").read_text())
    base, merged = (read_weights(chain / "B" / name) for name in ("base", "merged"))
    assert len(base.specs) == 6 == len(told["layers"]) and told["zeros"] == pytest.approx(0.75, abs=1e-3)
    for name, spec in base.specs.items():
        assert not spec.grid.mask and not (base[name].dequantize() == 0).float().mean() > 0.1, "packed dense"
        n, k = spec.shape
        zeros = int((merged[name].dequantize() == 0).sum())
        assert told["layers"][name] == {"zeros": round(0.75 * n * k), "parameters": n * k}
        assert zeros >= round(0.75 * n * k)
    assert (
        "75.0% of these integers stand for zero, pruned while it trained."
        in (chain / "B" / "exported" / "README.md").read_text()
    )
    assert (
        "75.0 % of the weights of 6 layers became zero while it trained."
        in (chain / "B" / "report.html").read_text()
    )
    state = sorted((chain / "B" / "checkpoints").iterdir())[-1] / "state.json"
    best = json.loads(state.read_text())["progress"]["best_step"]
    assert best > 2, "evaluations before the last zeros are of another model"


def test_the_task_keeps_these_zeros_in_8_bits(chain: Path) -> None:
    pruned, base, tuned = (read_weights(chain / x) for x in ("B/merged", "C/base", "C/merged"))
    moved = 0
    for name in pruned.specs:
        zeros = pruned[name].unpack_codes() == 128
        assert base.specs[name].grid.mask and (base[name].locked == zeros).all()
        assert not tuned[name].dequantize()[zeros].any()
        moved += int((tuned[name].unpack_codes() != base[name].unpack_codes()).sum())
    assert moved > 0
    model = load_exported(chain / "C" / "merged")
    layers = [
        m for m in model.modules() if isinstance(m, PackedLinear) and not isinstance(m, PackedEmbedding)
    ]
    schemes = [scheme for layer in layers if (scheme := scheme_of(layer)) is not None]
    assert len(schemes) == len(layers) == 6
    assert all(not s.symmetric and not s.dynamic and s.bits == 8 and s.scale for s in schemes)
    (words,) = (m for m in model.modules() if isinstance(m, PackedEmbedding))
    assert words.grid.bits == 8 and words.grid.group_size == -1
