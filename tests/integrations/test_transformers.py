"""from_pretrained on what we write: packed and exact, and no silent half-loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest, packed_layers
from lowbit_ft.export import LayerSpec
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import BinaryGrid
from lowbit_ft.integrations.transformers import PackedConfig, mark_packed
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear
from tests.integrations.loading import NATIVE, in_a_new_process, load
from tests.packed_tools import IDS, int_grid, packed_model, random_weights, tiny_checkpoint

MIXED = {
    "down_proj": int_grid(bits=8, group_size=-1),
    "o_proj": BinaryGrid(bits=2, group_size=32),
    "q_proj": int_grid(bits=2, symmetric=False, residual_bits=2),
    "": int_grid(bits=3, residual_bits=4),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def mixed(source: Path, tmp_path: Path) -> Path:
    checkpoint = Checkpoint.open(source, dtype="float32")
    write_model(tmp_path / "mixed", checkpoint, random_weights(checkpoint.empty_model(), MIXED), NATIVE)
    return tmp_path / "mixed"


def dense_bytes(model: nn.Module, elements: set[int]) -> int:
    """Bytes of floating tensors that are as large as a packed layer's dense weight would be."""
    tensors = [
        t
        for layer in model.modules()
        if isinstance(layer, PackedLinear)
        for t in (*layer.parameters(), *layer.buffers())
    ]
    return sum(
        t.numel() * t.element_size() for t in tensors if t.is_floating_point() and t.numel() in elements
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_stays_packed_and_is_exact_in_every_dtype(
    source: Path, mixed: Path, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(source, dtype=dtype)
    weights = random_weights(checkpoint.empty_model(), MIXED)
    model, reference = load(mixed, dtype), packed_model(checkpoint, weights)
    assert torch.equal(model(IDS).logits, reference(IDS).logits) and model(IDS).logits.dtype == dtype
    layers = dict(packed_layers(model))
    assert {name: LayerSpec.of(layer.base) for name, layer in layers.items()} == {
        name: LayerSpec.of(weight) for name, weight in weights.items()
    }
    assert all(layer.base.digest() == weights[name].digest() for name, layer in layers.items())
    elements = {weight.shape[0] * weight.shape[1] for weight in weights.values()}
    assert len(layers) == 7 and dense_bytes(model, elements) == 0
    packed = sum(weight.nbytes for weight in weights.values())
    rest = (
        sum(p.numel() for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers)
        * dtype.itemsize
    )
    rotary = sum(
        b.numel() * b.element_size() for n, b in model.named_buffers() if n.rpartition(".")[0] not in layers
    )
    assert model.get_memory_footprint() == packed + rest + rotary
    assert packed < 0.4 * sum(elements) * 2 * 7  # far below the bf16 linears


def test_generate_and_save_pretrained_round_trip(mixed: Path, tmp_path: Path) -> None:
    model = load(mixed)
    made = model.generate(IDS, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, IDS.shape[1] + 4)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits) and base_digest(again) == base_digest(model)
    assert {n: w.digest() for n, w in read_weights(tmp_path / "again").items()} == {
        n: w.digest() for n, w in read_weights(mixed).items()
    }


def test_save_pretrained_follows_the_model_not_the_folder_it_came_from(
    source: Path, mixed: Path, tmp_path: Path
) -> None:
    model = load(mixed)
    for name, layer in list(packed_layers(model)):  # as a merge does: residuals are dropped
        model.set_submodule(name, PackedLinear(layer.base.without_residual(), layer.bias))
    model.save_pretrained(tmp_path / "merged")
    assert all(getattr(w, "residual", None) is None for w in read_weights(tmp_path / "merged").values())
    assert base_digest(load(tmp_path / "merged")) == base_digest(model)
    # and a model that never came from a folder of ours
    checkpoint = Checkpoint.open(source, dtype="float32")
    fresh = packed_model(checkpoint, random_weights(checkpoint.empty_model(), int_grid()))
    mark_packed(fresh)
    fresh.save_pretrained(tmp_path / "fresh")
    assert torch.equal(load(tmp_path / "fresh")(IDS).logits, fresh(IDS).logits)


def test_a_loaded_model_trains_on(mixed: Path) -> None:
    model = load(mixed)
    assert model.hf_quantizer.is_trainable and model.is_quantized
    for name, layer in list(packed_layers(model)):
        if layer.grid.name == "binary":  # one method at a time
            model.set_submodule(name, nn.Linear(layer.in_features, layer.out_features, bias=False))
    attach(model, ADAPTERS["lr_qat"](method="lr_qat", rank=4))
    model.train()
    before = base_digest(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and base_digest(model) == before
    with pytest.raises(ValueError, match="adapters"):
        model.save_pretrained("/nowhere")


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.0.self_attn.k_proj"
DAMAGE: dict[str, Any] = {
    rf"no file has {LAYER}.codes, which layer {LAYER} \(W3 g64 sym\) needs": lambda t: t.pop(
        f"{LAYER}.codes"
    ),
    rf"no file has {LAYER}.residual": lambda t: t.pop(f"{LAYER}.residual"),
    "no file has model.norm.weight, which the model needs": lambda t: t.pop("model.norm.weight"),
    rf"{LAYER}.scale has shape \[1, 64\]": lambda t: t.update(
        {f"{LAYER}.scale": t[f"{LAYER}.scale"][:1].clone()}
    ),
    rf"{LAYER}.scale has dtype torch.float32": lambda t: t.update(
        {f"{LAYER}.scale": t[f"{LAYER}.scale"].float()}
    ),
    "model.embed_tokens.weight has shape": lambda t: t.update(
        {"model.embed_tokens.weight": torch.zeros(3, 128)}
    ),
    rf"layer {LAYER}: scale has NaN": lambda t: t[f"{LAYER}.scale"].fill_(float("inf")),
    "q_proj: zero is 4 on a grid of 4": lambda t: t["model.layers.0.self_attn.q_proj.zero"].fill_(4),
}


@pytest.mark.parametrize("message", list(DAMAGE))
def test_missing_and_wrong_tensors_are_errors_that_name_the_layer(message: str, mixed: Path) -> None:
    edit(mixed, DAMAGE[message])
    with pytest.raises(ValueError, match=message):
        load(mixed)


def config_of(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_configs_that_do_not_belong_to_the_model_are_refused(mixed: Path) -> None:
    original = (mixed / "config.json").read_text()
    for message, change in {
        "names the layer 'model.layers.7.x'": lambda q: q["grids"][0]["layers"].update(
            {"model.layers.7.x": [4, 4]}
        ),
        "this model's is LlamaRMSNorm": lambda q: q["grids"][0]["layers"].update({"model.norm": [4, 4]}),
        r"k_proj is \(64, 64\); this model's is \(64, 128\)": lambda q: [
            g["layers"].update({LAYER: [64, 64]}) for g in q["grids"] if LAYER in g["layers"]
        ],
        "unknown keys load_in_5bit": lambda q: q.update(load_in_5bit=True),
        "version": lambda q: q.update(version=99),
        "bits: got 7": lambda q: q["grids"][0].update(bits=7),
        # one layer fewer than was packed: its dense weight is in no file
        "no file has .*weight, which the model needs": lambda q: q["grids"][0]["layers"].popitem(),
    }.items():
        config_of(mixed, change)
        with pytest.raises(ValueError, match=message):
            load(mixed)
        (mixed / "config.json").write_text(original)
    assert PackedConfig.of(load(mixed)).layers == {n: LayerSpec.of(w) for n, w in read_weights(mixed).items()}


@pytest.fixture(scope="module")
def victim(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = Checkpoint.open(source, dtype="float32")
    target = tmp_path_factory.mktemp("victim") / "m"
    write_model(target, checkpoint, random_weights(checkpoint.empty_model(), MIXED), NATIVE)
    return target


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_header_or_config_never_loads_as_another_model(victim: Path, data: st.DataObject) -> None:
    """Random bytes in the safetensors header, or a cut: an error, or (a change that means nothing) the same
    model.
    """
    path, before = victim / "model.safetensors", {n: w.digest() for n, w in read_weights(victim).items()}
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    content = bytearray(original)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(32, 126))
    try:
        path.write_bytes(content)
        model = load(victim)
    except (ValueError, OSError):  # OSError: transformers' own, when it looks for the dtype in the file
        return
    finally:
        path.write_bytes(original)
    assert {name: layer.base.digest() for name, layer in packed_layers(model)} == before


IMPORT_ORDERS = {
    "before": "import lowbit_ft; assert 'transformers' not in sys.modules; import transformers",
    "after": "import transformers.quantizers; import lowbit_ft",
    "twice": "import lowbit_ft; from lowbit_ft.integrations import register; register(); import "
    "transformers; register()",
}


@pytest.mark.parametrize("order", list(IMPORT_ORDERS))
def test_a_plain_import_registers_before_or_after_transformers(order: str, mixed: Path) -> None:
    model = load(mixed)
    code = f"""
import sys, torch
{IMPORT_ORDERS[order]}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
import transformers.quantizers.auto as auto, transformers.modeling_utils
assert type(auto.__loader__).__module__.startswith(("importlib", "_frozen")), auto.__loader__
assert not any(type(f).__module__.startswith("lowbit") for f in sys.meta_path)
logits = model(torch.arange(3, 40)[None]).logits.detach()
print(type(model.model.layers[0].mlp.up_proj).__name__, float(logits.double().sum()))
"""
    name, total = in_a_new_process(code, mixed).split()
    assert name == "PackedLinear" and float(total) == float(model(IDS).logits.detach().double().sum())
