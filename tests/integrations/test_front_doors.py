"""The front doors of transformers on a packed model: device maps, dtypes, sharded saves, pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest, packed_layers
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear, packed_op_only
from tests.integrations.loading import NATIVE, load
from tests.packed_tools import IDS, int_grid, random_weights
from tests.processes import ROOT


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
    with pytest.raises(ValueError, match="is dense: to pack it while it loads give .*LowBitQuantConfig"):
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


@pytest.mark.parametrize("buffers", [False, True])
def test_an_adapter_over_a_base_on_the_disk(buffers: bool, decodable: Path, tmp_path: Path) -> None:
    """Trained, saved, loaded and merged with layers on the disk: the numbers of the model in memory."""
    spread = spread_over_disk(load(decodable))

    def on_disk(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            decodable,
            dtype=torch.float32,
            device_map=spread,
            offload_folder=tmp_path / name,
            offload_buffers=buffers,
        )

    def trained(model: Any) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(model, LowBitConfig(rank=4)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    reference, model = trained(load(decodable)), trained(on_disk("one"))
    layer = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    assert (
        layer.codes.is_meta == buffers
        and model.base_model.model.model.layers[1].input_layernorm.weight.is_meta
    )
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in ours.items())
    expected = reference(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, expected)
    reference.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(on_disk("two"), tmp_path / "adapter")
    assert again.hf_device_map == spread
    assert torch.equal(again(input_ids=IDS).logits, expected)
    assert torch.equal(again.merge_and_unload()(input_ids=IDS).logits, expected)
    with pytest.raises(
        ValueError, match="PeftModel.from_pretrained"
    ):  # transformers' own way would read a part
        on_disk("three").load_adapter(str(tmp_path / "adapter"))
