"""A fused matrix whose parts are on grids of their own: its model, the law, its line, PEFT, rotations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor

from lowbit_ft import pipeline
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, packed_layers
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import IntGrid
from lowbit_ft.integrations.peft import LowBitConfig, LowBitLinear
from lowbit_ft.integrations.transformers import PackedConfig
from lowbit_ft.merge import base_weights, merged_weights, verify_merge
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.fused import Fused, Segment, fused_modules, fusions_in
from lowbit_ft.model.linear import PackedLinear, packed_op_only
from lowbit_ft.model.load import load_model
from lowbit_ft.plan.model import skeleton
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rotations import FoldedCheckpoint, Rotation
from lowbit_ft.session import resume
from lowbit_ft.stages.models import stage_model
from tests.adapters.common import randomize
from tests.adapters.test_segments import PHI3
from tests.architectures import CONFIGS, checkpoint_of
from tests.export.common import checkpoint
from tests.family_rows import recipe_file
from tests.packed_tools import IDS, adapter_config

LAYOUTS = {
    "ranges": {"q": Segment(0, 12), "k": Segment(12, 6), "v": Segment(18, 6)},
    "strided": {name: Segment(2 * i, 2, 4, 6) for i, name in enumerate("qkv")},
    "uneven": {"a": Segment(0, 2, 2, 6), "b": Segment(2, 4), "c": Segment(8, 16)},
}
LAYOUT_PHI3 = {"q": Segment(0, 64), "k": Segment(64, 32), "v": Segment(96, 32)}
OTHER = {"bits": 8, "group_size": -1}
GRID: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "calibrate": "minmax"}
PARTS = {  # family -> the overrides, and what they make of the first layer
    "phi3": (["*.qkv_proj.v", "*.gate_up_proj.up"], ["q", "k", "v", "gate", "up"]),
    "gpt_neox": (["*.query_key_value.k"], ["q", "k", "v"]),
    "gpt2": (["*.c_attn.v"], ["q", "k", "v"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_are_the_whole(layout: str) -> None:
    torch.manual_seed(0)
    fusion, whole = LAYOUTS[layout], torch.nn.Linear(8, 24)
    fused = Fused(fusion, 8, whole.bias, torch.float32)
    for name, rows in fusion.items():
        linear = torch.nn.Linear(8, rows.size, bias=False)
        linear.weight.data = rows.of(whole.weight.data)
        fused.set_submodule(name, linear)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(fused(x), whole(x))
    assert torch.equal(fused.weight, whole.weight) and fused(x).shape == (2, 5, 24)
    assert dict(fusions_in(torch.nn.ModuleDict({"m": fused}))) == {"m": fusion}


def section(family: str, **fields: Any) -> QuantSection:
    overrides = [{"match": match} | OTHER for match in PARTS[family][0]]
    return QuantSection(**GRID | {"overrides": overrides} | fields)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Random checkpoints, which are traced once each."""
    root = tmp_path_factory.mktemp("fused")
    return {family: checkpoint_of(CONFIGS[family](), root / family) for family in PARTS}


def packed(source: Checkpoint, family: str, **fields: Any) -> Any:
    return quantize(source, section(family, **fields))[0]


def logits(model: Any) -> Tensor:
    with torch.no_grad(), packed_op_only(model):
        return model.eval()(IDS).logits


def into_dense(dense: Any, weight: Callable[[PackedLinear], Tensor], model: Any) -> Any:
    """A dense model, in float64, with the dequantized weights of a packed one, parts put together by hand."""
    fused = dict(fused_modules(model))
    for name, layer in packed_layers(model):
        head, _, part = name.rpartition(".")
        target = dense.get_submodule(head if head in fused else name)
        rows = fused[head].fusion[part].channels() if head in fused else torch.arange(layer.out_features)
        matrix = target.weight.data.t() if hasattr(target, "nf") else target.weight.data
        matrix[rows] = weight(layer).to(matrix.dtype)
    return dense.double()


@pytest.mark.parametrize("family", PARTS)
def test_the_packed_model_is_the_dense_one_with_its_parts(
    family: str, sources: dict[str, Checkpoint], tmp_path: Path
) -> None:
    source = sources[family]
    model = packed(source, family)
    names = [
        name
        for name, _ in packed_layers(model)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), Fused)
    ]
    assert list(dict.fromkeys(name.rpartition(".")[2] for name in names)) == PARTS[family][1]
    chosen = {match.removeprefix("*") for match in PARTS[family][0]}
    for name, layer in packed_layers(model):
        wanted = "W8 row asym" if any(name.endswith(end) for end in chosen) else "W4 g32 asym"
        assert str(layer.grid) == wanted, name
    dense = into_dense(load_model(source, dtype=torch.float32), lambda layer: layer.base.dequantize(), model)
    torch.testing.assert_close(logits(model).double(), logits(dense), rtol=0, atol=2e-6)
    # its folder, and what transformers makes of it
    manifest = write_model(tmp_path / "base", source, base_weights(model), EXPORTERS["native"])
    assert manifest["layers"].keys() == dict(packed_layers(model)).keys()
    again = load_exported(tmp_path / "base")
    assert torch.equal(logits(again), logits(model))
    assert PackedConfig.of(again).fused == PackedConfig.of(model).fused
    assert read_weights(tmp_path / "base").specs == base_weights(model).specs
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_exported(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_what_is_trained_is_what_ships(family: str, sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Every adapter of integers over every layer of the model, parts among them."""
    source = sources[family]
    model = packed(source, family)
    exact = [name for name, kind in ADAPTERS.items() if kind.grid_name == "integer" and kind.exact_merge]
    assert len(exact) > 5
    for method in exact:
        attach(model, adapter_config(method))
        for _, layer in packed_layers(model):
            assert layer.adapter is not None
            randomize(layer.adapter, 0.3)
            merged, eye = layer.adapter.merge(layer.base), torch.eye(layer.in_features)
            assert torch.equal(layer.adapter(eye, layer.base), merged.dequantize().t()), method
    trained = logits(model)
    write_model(tmp_path / "merged", source, merged_weights(model), EXPORTERS["native"])
    assert torch.equal(logits(load_exported(tmp_path / "merged")), trained)
    assert verify_merge(model, tmp_path / "merged").exact


def test_gptq_has_one_hessian_for_all_parts(sources: dict[str, Checkpoint]) -> None:
    """Parts on the grid of the rest have the codes that they have in the whole: rows are rounded alone."""
    torch.manual_seed(0)
    ids = torch.randint(0, 128, (4, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    apart, whole = (
        quantize(sources["gpt_neox"], section("gpt_neox", **more), calibration=lambda: [batch])[0]
        for more in ({"calibrate": "gptq"}, {"calibrate": "gptq", "overrides": []})
    )
    name = "gpt_neox.layers.0.attention.query_key_value"
    dense = whole.get_submodule(name).base.dequantize()
    for part, rows in fusions_in(apart)[name].items():
        own = apart.get_submodule(f"{name}.{part}").base.dequantize()
        assert torch.equal(own, dense[rows.channels()]) == (part != "k"), part


def test_adapters_mean_the_whole_or_a_part(sources: dict[str, Checkpoint]) -> None:
    model = packed(sources["phi3"], "phi3")
    for targets, ends in (
        (["qkv_proj"], {"q", "k", "v"}),
        (["*.qkv_proj.v", "down_proj"], {"v", "down_proj"}),
    ):
        for _, layer in packed_layers(model):
            layer.adapter = None
        table = attach(model, adapter_config("lr_qat", targets=targets))
        assert {row.layer.rpartition(".")[2] for row in table.rows} == ends


def test_peft_has_an_adapter_for_each_part(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = sources["phi3"]
    model = packed(source, "phi3")
    write_model(tmp_path / "base", source, base_weights(model), EXPORTERS["native"])
    with pytest.raises(ValueError, match="its parts are packed apart.*name these: q, k, v"):
        get_peft_model(model, LowBitConfig(target_modules=["qkv_proj"]))
    wrapped = get_peft_model(load_exported(tmp_path / "base"), LowBitConfig(rank=2, segments="auto"))
    for module in wrapped.modules():
        if isinstance(module, LowBitLinear):
            randomize(module.lowbit_adapters)
    wanted = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_exported(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(again.merge_and_unload()), wanted)


def test_other_formats_refuse_the_parts_by_name(sources: dict[str, Checkpoint]) -> None:
    source, name = sources["phi3"], "model.layers.0.self_attn.qkv_proj"
    source.take_apart({name: LAYOUT_PHI3})
    for exporter in EXPORTERS.values():
        reason = exporter.reject_matrix(source.matrices[f"{name}.v"], IntGrid(), source.parts(f"{name}.v"))
        if exporter.name in ("native", "onnx"):
            assert reason is None
        else:
            assert reason is not None and reason.startswith(
                f"{exporter.name} has one tensor and one grid for"
            )
            assert "give all parts the same bits" in reason and "export.format: native" in reason


def test_rotations_are_folded_into_the_parts(sources: dict[str, Checkpoint]) -> None:
    """r1 turns inputs, r2 the rows of v; q, k and v are those of the turned whole."""
    source = sources["phi3"]
    model = packed(source, "phi3")
    folded = FoldedCheckpoint(source, Rotation(seed=0, r1=True, r2=(True, True)))
    turned = quantize(folded, section("phi3"))[0]
    name = "model.layers.0.self_attn.qkv_proj"
    whole = folded.matrix(name, dtype=torch.float32)
    for part, rows in fusions_in(turned)[name].items():
        assert torch.equal(folded.matrix(f"{name}.{part}", dtype=torch.float32), whole[rows.channels()])
        own = turned.get_submodule(f"{name}.{part}").base.dequantize() - whole[rows.channels()]
        assert own.norm() < 0.2 * whole.norm()
    dense = load_model(source, dtype=torch.float32)
    far = (logits(turned) - logits(dense)).norm() / logits(dense).norm()
    assert far < 2 * (logits(model) - logits(dense)).norm() / logits(dense).norm()


def test_the_line_ships_what_it_trained(tmp_path: Path) -> None:
    two_layers: dict[str, Any] = PHI3 | {"num_hidden_layers": 2}
    source = checkpoint(tmp_path / "phi3", transformers.Phi3Config(**two_layers))
    overrides = [
        {"match": "*.qkv_proj.v", "bits": 8},
        {"match": "*.layers.0.mlp.gate_up_proj.gate", "bits": 3, "group_size": 64},
    ]
    changes = {
        "model.path": str(source.folder),
        "quant": {
            "bits": 4,
            "group_size": 32,
            "calibrate": "absmax",
            "residual_bits": 0,
            "overrides": overrides,
        },
        "quant.activations": {"bits": 8, "targets": ["qkv_proj", "down_proj"]},
        "adapter": {"method": "lr_qat", "rank": 2, "init": "loftq", "segments": "auto"},
        "export": {"format": "native", "verify": False},
        "train.max_steps": 1,
    }
    recipe = load_recipe(recipe_file(tmp_path, changes))
    run = pipeline.run(recipe).parent
    with resume(run) as session:
        trained = logits(stage_model(session, "trained"))
    assert torch.equal(logits(load_exported(run / "merged")), trained)
    rows = {row["stage"]: row for row in json.loads((run / "evaluation.json").read_text())["rows"]}
    assert rows["trained"]["perplexity"] == rows["merged"]["perplexity"] != rows["quantized"]["perplexity"]
    table = {row["layer"]: row for row in json.loads((run / "quant.json").read_text())}
    found = {name: (row["bits"], row["group_size"]) for name, row in table.items() if row["bits"] is not None}
    for layer in (0, 1):
        at = f"model.layers.{layer}"
        own = {part: found[f"{at}.self_attn.qkv_proj.{part}"] for part in "qkv"}
        assert own == {"q": (4, 32), "k": (4, 32), "v": (8, 32)}
    assert found["model.layers.0.mlp.gate_up_proj.gate"] == (3, 64)
    assert found["model.layers.1.mlp.gate_up_proj"] == (4, 32), "no override names a part of this one"
    planned = skeleton(recipe, source.folder)
    trainable = json.loads((run / "trainable.json").read_text())
    assert planned.trainable == trainable["trainable"]
    tensors = {row["layer"]: row["tensors"] for row in trainable["rows"]}
    assert tensors["model.layers.0.self_attn.qkv_proj.q"]["A"] == 2 * 64
    assert tensors["model.layers.1.mlp.gate_up_proj"]["A"] == 2 * 2 * 64, "segments of what is whole"
    sizes = {row.layer: row.base_bytes + row.residual_bytes for row in planned.rows if row.reason is None}
    assert sizes == {name: row["packed_bytes"] for name, row in table.items() if row["bits"] is not None}
    pipeline.merge(run)  # again from the files: it must be the same


def test_a_folder_with_wrong_parts_is_refused(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = sources["phi3"]
    model = packed(source, "phi3")
    write_model(tmp_path / "base", source, base_weights(model), EXPORTERS["native"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    good = config["fused"]
    for entries, words in (
        ("x", "needs a list"),
        ([{"parts": {}, "layers": []}], "needs an object"),
        ([{"parts": {"q": [0, 64]}, "layers": good[0]["layers"]}], r"needs \[start, width, count, stride\]"),
        ([good[0] | {"parts": {"forward": [0, 64, 1, 0]}}], "got 'forward'; allowed: q, k, v"),
        ([good[0] | {"layers": ["model.x"]}, good[1]], "is no layer of grids"),
        ([*good, good[0]], "is listed twice"),
        ([good[0] | {"parts": good[0]["parts"] | {"q": [0, 32, 1, 0]}}], "rows 0:32 are 32"),
        ([good[0] | {"parts": good[0]["parts"] | {"k": [32, 32, 1, 0]}}], "are not its 128 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            PackedConfig(**{k: v for k, v in config.items() if k != "fused"}, fused=entries)
