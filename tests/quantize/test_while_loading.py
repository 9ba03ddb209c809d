"""Packing without a recipe: from_pretrained with a LowBitQuantConfig and `lowbit-ft quantize MODEL` give the
integers of a recipe, one layer at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowbit_ft import LowBitConfig, LowBitQuantConfig, pipeline
from lowbit_ft.adapters.attach import base_digest, packed_layers
from lowbit_ft.cli.quantize import quantize_model
from lowbit_ft.export.reader import read_weights
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.quantize import while_loading
from lowbit_ft.recipe.recipe import load_recipe
from tests.architectures import CONFIGS, checkpoint_of
from tests.live_bytes import LiveBytes
from tests.packed_tools import IDS, tiny_checkpoint
from tests.processes import ROOT

TINY = ROOT / "recipes" / "assets" / "tiny-llama"
ROWS = ROOT / "recipes" / "assets" / "docstrings" / "train.jsonl"
FEW = {"samples": 4, "sequence_len": 32}


def packed(path: Path, *, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    config = LowBitQuantConfig(**options)
    return kind.from_pretrained(path, quantization_config=config, dtype=torch.float32).eval()


def digests(layers: Any) -> dict[str, str]:
    return {name: weight.digest() for name, weight in layers}


def of_model(model: Any) -> dict[str, str]:
    return digests((name, layer.base) for name, layer in packed_layers(model))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "group_size": 64, "symmetric": False, "lm_head": 8, "calibrate": "minmax"},
        {"bits": 3, "targets": ["*.0.*"], **FEW},
    ],
)
def test_three_doors_give_the_same_integers(options: dict[str, Any], tmp_path: Path) -> None:
    text = {key: value for key, value in options.items() if key in FEW}
    plain = {key: value for key, value in options.items() if key not in FEW}
    rows: Any = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()] if text else None
    here = packed(TINY, calibration=rows, **options)
    assert here.lowbit_table.quantized and here(IDS).logits.isfinite().all()

    overrides = [f"quant.calibration.{key}={value}" for key, value in text.items()]
    folder = quantize_model(
        str(TINY),
        ["model.dtype=float32", *overrides],
        plain,
        str(ROWS) if text else None,
        tmp_path / "packed",
    )
    assert digests(read_weights(folder).items()) == of_model(here)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(again(IDS).logits, here(IDS).logits)

    overrides += [f"quant.{key}={json.dumps(value)}" for key, value in plain.items()]
    overrides += [
        f"model.path={TINY}",
        f"output={tmp_path / 'run'}",
        "model.dtype=float32",
        f"data.train={{path: {ROWS}, format: chat}}",
        "export.format=native",
        *(["quant.calibrate=gptq"] if text else []),
    ]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides)
    assert digests(read_weights(pipeline.quantize(recipe)).items()) == of_model(here)


def test_the_dense_model_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=6, hidden_size=256, intermediate_size=512)
    read: list[str] = []
    real = while_loading.Checkpoint.matrix
    monkeypatch.setattr(
        while_loading.Checkpoint, "matrix", lambda self, name, **k: read.append(name) or real(self, name, **k)
    )
    with LiveBytes() as counted:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            quantization_config=LowBitQuantConfig(residual_bits=0, calibrate="absmax"),
            dtype=torch.bfloat16,
        )
    layers = dict(packed_layers(model))
    dense = 2 * sum(layer.in_features * layer.out_features for layer in layers.values())
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = 4 * max(layer.in_features * layer.out_features for layer in layers.values())
    held = sum(layer.base.nbytes for layer in layers.values())
    assert sorted(read) == sorted(layers) and len(layers) == 42
    # The packed tensors, and one matrix in fp32 with what its packing needs.
    assert counted.peak < held + rest + 4 * largest < dense, (counted.peak, held, rest, largest, dense)


def test_adapters_train_merge_and_save_on_it(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "tiny")
    model = get_peft_model(packed(path, bits=3, group_size=32), LowBitConfig(rank=4, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(packed(path, bits=3, group_size=32), tmp_path / "adapter")
    assert torch.equal(fresh.eval()(IDS).logits, trained)
    merged = fresh.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert torch.equal(loaded(IDS).logits, trained) and base_digest(loaded) == base_digest(merged)


PART = {"match": "*.qkv_proj.v", "bits": 8}


@pytest.mark.parametrize(
    "name, more",
    [("qwen3_moe", {}), ("gemma2", {"lm_head": 8}), ("phi3", {"overrides": [PART]})],
)
def test_experts_tied_heads_and_parts(
    name: str, more: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint_of(CONFIGS[name](), tmp_path / "m").folder
    options: dict[str, Any] = {"group_size": 32} | more
    model = packed(path, **options)
    attention = "eager" if name == "gemma2" else "sdpa"
    folder = quantize_model(
        str(path),
        ["model.dtype=float32", f"model.attention={attention}"],
        options | {"bits": 4},
        output=tmp_path / "packed",
    )
    assert of_model(model) == digests(read_weights(folder).items())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text


def test_a_classifier_is_packed_under_its_new_head(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "tiny", pad_token_id=0)
    model = packed(path, kind=AutoModelForSequenceClassification, bits=4)
    assert isinstance(model.score, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert of_model(model) == of_model(packed(path, bits=4))
    assert model(IDS).logits.isfinite().all()


def test_what_is_refused_and_how_to_go_on(tmp_path: Path) -> None:
    def refused(*words: str, **options: Any) -> None:
        with pytest.raises(ValueError) as error:
            LowBitQuantConfig(**options)
        assert all(word in str(error.value) for word in words), error.value

    refused("gptq looks at rows", "calibrate: mse", calibrate="gptq")
    refused("mse looks at no rows", "gptq", calibrate="mse", calibration=["a text"])
    refused("quant.bits: got 5; allowed", bits=5)
    refused("quant.group: unknown key; did you mean 'group_size'?", group=64)
    refused("quant.rotation", "lowbit-ft quantize recipe.yaml", rotation={"kind": "hadamard"})
    # What rows are is looked at when the config is made, as the recipe's check does.
    refused("calibration: got 3, a int; allowed: the path of a file, or rows", calibration=3)
    refused("got no rows", calibration=[])
    refused("token ids [rows, tokens]", calibration=torch.zeros(3))
    refused("a row is a text, a mapping, or token ids", calibration=[3])
    refused("a row is a text, a mapping, or token ids", calibration=[[1, "a"]])
    refused(
        "got a mapping (samples is a keyword, dampin; did you mean 'damping'?)",
        "keywords beside it: samples, sequence_len",
        calibration={"samples": 3, "dampin": 1},
    )
    refused("quant.calibration.path: got 'rowz.jsonl'; there is no such file", calibration="rowz.jsonl")
    path = tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(ValueError, match="its columns are question; allowed: "):
        packed(path, calibration=[{"question": "a"}])
    with pytest.raises(ValueError, match="packed on one device"):
        AutoModelForCausalLM.from_pretrained(
            path, quantization_config=LowBitQuantConfig(), device_map={"model": "cpu", "lm_head": "disk"}
        )
    for place in ("nope", "meta", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match="needs a device that is here"):
            AutoModelForCausalLM.from_pretrained(
                path, quantization_config=LowBitQuantConfig(), device_map={"": place}
            )
    with pytest.raises(ValueError, match="data: a section of a recipe"):
        quantize_model(str(path), ["data.packing=false"])
    with pytest.raises(ValueError, match="quant.targets.*no layer"):
        quantize_model(str(path), ["quant.targets=[q_porj]"])


def test_parts_of_a_fused_matrix_through_every_door(tmp_path: Path) -> None:
    """Rows of the whole go along: what was written can be read, trained, merged and exported."""
    path = checkpoint_of(CONFIGS["phi3"](), tmp_path / "dense").folder
    options: dict[str, Any] = {"group_size": 32, "calibrate": "absmax"}
    options["overrides"] = [{"match": "*.qkv_proj.v", "bits": 8}]
    here = packed(path, **options)
    folder = quantize_model(str(path), ["model.dtype=float32"], options, output=tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(again(IDS).logits, here(IDS).logits)
    assert of_model(again) == of_model(here) == digests(read_weights(folder).items())
    assert any(name.endswith("qkv_proj.v") for name in of_model(here))

    peft = get_peft_model(again, LowBitConfig(rank=4, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=2.0)
    peft.save_pretrained(tmp_path / "adapter")
    out = pipeline.export(tmp_path / "adapter", "native", tmp_path / "out", folder)
    merged = of_model(peft.merge_and_unload())
    assert digests(read_weights(out).items()) == merged != of_model(here)
    with pytest.raises(ValueError, match="one tensor and one grid for qkv_proj"):
        pipeline.export(folder)


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["quant=3"], {}, "quant: got 3; write quant.key=value"),
        (["quant.bits=3"], {"bits": 4}, "quant.bits: got 3 beside the option that says 4"),
        (["model.path=org/other"], {}, "model.path: got 'org/other' beside"),
    ],
)
def test_said_twice(overrides: list[str], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_model(str(TINY), overrides, options, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
