"""from_pretrained on what we write: packed and exact with our package, exact without it, and no silent
half-loading.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import lowbit_ft  # noqa: F401  (registers)
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest, packed_layers
from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import BinaryGrid
from lowbit_ft.integrations.transformers import LowbitConfig, mark_packed
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear, packed_op_only
from tests.packed_tools import IDS, int_grid, packed_model, random_weights, tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NATIVE, COMPRESSED = EXPORTERS["native"], EXPORTERS["compressed-tensors"]
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


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def in_a_new_process(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ------------------------------------------------------------------------------------------ native


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
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, IDS.shape[1] + 4)
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
    assert LowbitConfig.of(load(mixed)).layers == {n: LayerSpec.of(w) for n, w in read_weights(mixed).items()}


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


# ----------------------------------------------------------------------------- compressed-tensors, without us


WITHOUT_US = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
out, ids = {}, torch.arange(3, 40)[None]
for name, folder, asymmetric in json.loads(sys.argv[1]):
    for dtype in ("float32", "bfloat16"):
        for dequantize in {asymmetric, True} if "mixed" not in name else {False}:
            options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
            options["dtype"] = getattr(torch, dtype)
            model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
            with torch.no_grad():
                out[f"{name} {dtype} {dequantize}"] = model(ids).logits.contiguous()
assert not any(name.startswith("lowbit") for name in sys.modules)
save_file(out, sys.argv[2])
"""


def test_compressed_tensors_loads_without_our_package_with_equal_logits(source: Path, tmp_path: Path) -> None:
    """Every bit width, symmetric and asymmetric, fp32 and bf16, in both modes of transformers that can read
    it.
    """
    cases: dict[str, Any] = {
        f"W{bits} {'sym' if symmetric else 'asym'}": int_grid(bits=bits, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    }
    cases["row"] = int_grid(bits=3, group_size=-1)
    cases["mixed"] = {
        "down_proj": int_grid(bits=8, group_size=-1),
        "v_proj": int_grid(bits=2),
        "": int_grid(bits=3),
    }
    expected, folders = {}, []
    for name, grid in cases.items():
        asymmetric = not isinstance(grid, dict) and not grid.symmetric
        folders.append((name, str(tmp_path / name), asymmetric))
        for dtype in ("float32", "bfloat16"):
            checkpoint = Checkpoint.open(source, dtype=dtype)
            weights = random_weights(checkpoint.empty_model(), grid)
            if dtype == "float32":
                write_model(tmp_path / name, checkpoint, weights, COMPRESSED)
            with torch.no_grad():
                expected[f"{name} {dtype}"] = packed_model(checkpoint, weights)(IDS).logits
    in_a_new_process(WITHOUT_US, json.dumps(folders), tmp_path / "logits.safetensors")
    found = load_file(tmp_path / "logits.safetensors")
    assert {key.rpartition(" ")[0] for key in found} == set(expected) and len(found) == 2 * (
        4 + 4 * 2 + 2 + 1
    )
    different = [
        key for key, logits in found.items() if not torch.equal(logits, expected[key.rpartition(" ")[0]])
    ]
    assert different == []


# ---------------------------------------------------------------------------- the front doors of transformers


def spread_over_disk(model: Any) -> dict[str, str]:
    """A device map with the two middle layers of `model` on the disk."""
    return {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"} | {
        f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(len(model.model.layers))
    }


@pytest.fixture(scope="module")
def decodable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers on a grid the int4 kernel holds, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("decodable")
    checkpoint = Checkpoint.open(ROOT / "recipes" / "assets" / "tiny-llama")
    weights = random_weights(checkpoint.empty_model(), int_grid())
    write_model(folder / "m", checkpoint, weights, NATIVE)
    return folder / "m"


@pytest.mark.parametrize(
    "device_map",
    [None, "cpu", "auto", "balanced", {"": "cpu"}, torch.device("cpu"), "disk", "disk with buffers"],
)
def test_device_maps(device_map: Any, decodable: Path, tmp_path: Path) -> None:
    expected = load(decodable)(IDS).logits
    options: dict[str, Any] = {"device_map": device_map}
    if isinstance(device_map, str) and device_map.startswith("disk"):
        options = {"device_map": spread_over_disk(load(decodable)), "offload_folder": tmp_path / "offload"}
        options["offload_buffers"] = "buffers" in device_map
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(decodable, dtype=dtype, **options).eval()
        assert model.dtype == dtype and sum(isinstance(m, PackedLinear) for m in model.modules()) == 28
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        kept = [layer._repacked is not None for _, layer in packed_layers(model)]
        # in float32 nothing is repacked; what accelerate moves in and out of memory never is
        offloaded = options.get("offload_buffers", False)
        assert sum(kept) == (0 if dtype == torch.float32 else 21 if offloaded else 28)
        if dtype == torch.float32:
            assert torch.equal(model(IDS).logits, expected)


def test_dtype_of_the_folder_unless_another_is_asked_for(decodable: Path) -> None:
    for asked, dtype in {
        "auto": torch.bfloat16,
        None: torch.bfloat16,
        "float32": torch.float32,
        torch.float16: torch.float16,
    }.items():
        model = AutoModelForCausalLM.from_pretrained(decodable, dtype=asked)
        assert model.dtype == dtype == model(IDS).logits.dtype
        assert {layer.scale.dtype for _, layer in packed_layers(model)} == {torch.bfloat16}
    assert model.to(torch.float32).dtype == torch.float32 and base_digest(model) == base_digest(
        load(decodable)
    )


def test_a_sharded_save_pretrained_and_the_decoder_alone(decodable: Path, tmp_path: Path) -> None:
    model = load(decodable)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path / "sharded")(IDS).logits, model(IDS).logits)
    decoder = AutoModel.from_pretrained(decodable, dtype=torch.float32).eval()
    assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    decoder.save_pretrained(tmp_path / "decoder")
    names = read_weights(tmp_path / "decoder")
    assert all(name.startswith("layers.") for name in names) and len(names) == 28
    again = AutoModel.from_pretrained(tmp_path / "decoder", dtype=torch.float32).eval()
    assert torch.equal(again(IDS).last_hidden_state, decoder(IDS).last_hidden_state)


def test_packing_while_loading_is_refused_with_the_way_out(decodable: Path) -> None:
    config = load(decodable).config.quantization_config
    with pytest.raises(ValueError, match="run `lowbit-ft quantize`"):
        AutoModelForCausalLM.from_pretrained(
            ROOT / "recipes" / "assets" / "tiny-llama", quantization_config=config
        )


def test_pipeline_and_generate_answer_alike(decodable: Path) -> None:
    asked = [{"role": "user", "content": "def f(x): return x"}]
    answer = pipeline("text-generation", model=str(decodable), dtype=torch.bfloat16, device_map="cpu")
    said = answer(asked, max_new_tokens=6, do_sample=False)[0]["generated_text"][-1]["content"]
    model, tokenizer = load(decodable, torch.bfloat16), AutoTokenizer.from_pretrained(decodable)
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == said and said


def test_a_decoded_token_is_close_to_the_packed_op_and_a_prompt_is_equal_to_it(decodable: Path) -> None:
    model = load(decodable, torch.bfloat16)
    with torch.no_grad():
        prompt = model(IDS).logits
        step = model(IDS[:, :1]).logits.float()
        assert torch.equal(model(IDS).logits, prompt), (
            "what was decoded before changes nothing for more than four rows"
        )
        with packed_op_only(model):
            assert torch.equal(model(IDS).logits, prompt)
            exact = model(IDS[:, :1]).logits.float()
    assert not torch.equal(step, exact), "the int4 kernel was not used"
    assert float((step - exact).abs().max()) <= 0.05 * float(exact.abs().max())


def test_a_model_that_has_decoded_trains_on_the_packed_op(decodable: Path) -> None:
    model = load(decodable, torch.bfloat16)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    attach(model, ADAPTERS["lr_qat"](method="lr_qat", rank=4))
    model.train()
    assert all(layer._repacked is None for _, layer in packed_layers(model))
    model(input_ids=IDS[:, :3], labels=IDS[:, :3]).loss.backward()
    assert all(
        layer.adapter.B.grad is not None for _, layer in packed_layers(model) if layer.adapter is not None
    )
