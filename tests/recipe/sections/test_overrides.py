"""quant.overrides of a part of a fused matrix: its name, what it means, and how a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from lowbit_ft.grid import IntGrid
from lowbit_ft.recipe.layers import read_shapes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections import overrides
from lowbit_ft.recipe.sections.quant import packed_layers
from lowbit_ft.segments import Segments
from tests.adapters.test_segments import PHI3
from tests.export.common import checkpoint
from tests.recipe.recipe_text import GOOD, problems_with, write


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    two_layers: dict[str, Any] = PHI3 | {"num_hidden_layers": 2}
    return checkpoint(tmp_path_factory.mktemp("phi3"), transformers.Phi3Config(**two_layers)).folder


def fields(folder: Path, *matches: str, **more: object) -> tuple[str, ...]:
    items = ", ".join(f"{{match: '{match}', bits: 8}}" for match in matches)
    given = {
        "model.path": folder,
        "quant.group_size": 32,
        "data.sequence_len": 32,
        "export.format": "native",
    } | more
    return (f"quant.overrides=[{items}]", *(f"{key}={value}" for key, value in given.items()))


def test_a_part_has_the_grid_of_its_override(phi3: Path) -> None:
    recipe = load_recipe(write(GOOD), fields(phi3, "*.0.*.qkv_proj", "*.qkv_proj.v"))
    layers = {layer.name: layer for layer in packed_layers(recipe.quant, read_shapes(phi3))}
    own = {name: layer for name, layer in layers.items() if ".qkv_proj" in name}
    assert [name.rpartition(".")[2] for name in own] == ["q", "k", "v"] * 2
    assert [layer.out_features for layer in own.values()] == [64, 32, 32] * 2
    bits = [recipe.quant.grid_for(*layer.names).bits for layer in own.values()]
    assert bits == [8, 8, 8, 4, 4, 8], "what means the whole means its parts"
    assert "model.layers.0.mlp.gate_up_proj" in layers, "no override names a part of it"


def test_symmetry_is_a_key_of_overrides_too(phi3: Path) -> None:
    text = "quant.overrides=[{match: down_proj, symmetric: false}, {match: gate_up_proj.up, bits: 3}]"
    quant = load_recipe(write(GOOD), (*fields(phi3)[1:], text)).quant
    assert quant.grid_for("m.mlp.down_proj") == IntGrid(bits=4, group_size=32, symmetric=False)
    up = quant.grid_for("m.mlp.gate_up_proj.up", "m.mlp.gate_up_proj")
    assert up == IntGrid(bits=3, group_size=32)


def test_without_such_an_override_nothing_is_traced(phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(folder: Path) -> dict[str, Segments]:
        raise AssertionError("traced")

    monkeypatch.setattr(overrides, "segments_in", never)
    assert not problems_with(GOOD, fields(phi3, "qkv_proj", "*.mlp.*"))


@pytest.mark.parametrize(
    ("match", "words"),
    [
        (
            "*.qkv_proj.val",
            "got '*.qkv_proj.val', but the parts of model.layers.0.self_attn.qkv_proj are q, k, v",
        ),
        ("*.gate_up_proj.upp", "gate_up_proj are gate, up; did you mean 'up'?"),
        ("*.o_proj.q", "o_proj is no fused matrix, it has no parts; use '*.o_proj' for the whole layer"),
        ("*.qkv_prj.v", "matches no quantized layer; did you mean 'qkv_proj.v'?"),
    ],
)
def test_a_wrong_part_is_told(phi3: Path, match: str, words: str) -> None:
    (problem,) = problems_with(GOOD, fields(phi3, match))
    assert "quant.overrides.0.match: " in problem and words in problem


def test_a_format_without_parts_is_refused_before_training(phi3: Path) -> None:
    given = fields(phi3, "*.qkv_proj.v", **{"export.format": "compressed-tensors"})
    (problem,) = problems_with(GOOD, given)
    assert "export.format: got 'compressed-tensors' (for model.layers.0.self_attn.qkv_proj.q" in problem
    assert "one grid for qkv_proj" in problem and "give all parts the same bits" in problem


def test_a_model_that_cannot_be_traced_says_so(phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untraced(folder: Path) -> dict[str, Segments]:
        raise ValueError("torch.export cannot trace Phi3ForCausalLM")

    monkeypatch.setattr(overrides, "segments_in", untraced)
    (problem,) = problems_with(GOOD, fields(phi3, "*.qkv_proj.v"))
    assert "got '*.qkv_proj.v', which matches no quantized layer" in problem
    assert problem.endswith("nor is it known as a part of one: torch.export cannot trace Phi3ForCausalLM")
