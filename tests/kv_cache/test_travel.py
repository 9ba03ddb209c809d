"""The configuration goes with the folders that carry it, and is said where it is a server's flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import lowbit_ft
from lowbit_ft.adapters.attach import adapter_state
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.card import CardFacts, model_card, serve_line
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.kv_cache import KVConfig, kv_config_of
from lowbit_ft.kv_cache.cache import PackedLayer
from lowbit_ft.merge import merge
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rundir import shipped
from tests.kv_cache.models import GRIDS, tokens
from tests.loop_tools import go, stop_at
from tests.packed_tools import adapted_llama, adapter_config, int_grid, tiny_checkpoint
from tests.toy import batches, equal

assert lowbit_ft.__name__  # its import teaches transformers the format
QUANT: dict[str, Any] = {"calibrate": "absmax", "group_size": 64}
INT4 = GRIDS[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Checkpoint]:
    """merged/ of a packed tiny model with an int4 cache, the model, and its checkpoint."""
    folder = tmp_path_factory.mktemp("kv")
    checkpoint = Checkpoint.open(tiny_checkpoint(folder / "dense"), dtype="float32")
    section = QuantSection.model_validate({**QUANT, "kv_cache": {"bits": 4}})
    model, _ = quantize(checkpoint, section)
    merge(model, checkpoint, folder / "merged")
    return folder, model, checkpoint


def test_a_folder_is_read_with_its_cache_and_written_again(run: Any, tmp_path: Path) -> None:
    folder, model, _ = run
    assert kv_config_of(model) == INT4
    with torch.no_grad():
        want = model(tokens(), use_cache=False).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        assert kv_config_of(loaded) == INT4
        assert torch.equal(loaded(tokens(), use_cache=False).logits, want)
        assert kv_config_of(AutoModel.from_pretrained(folder / "merged")) == INT4
        loaded.save_pretrained(tmp_path / "again")
        again = load_exported(tmp_path / "again")
        assert torch.equal(again(tokens(), use_cache=False).logits, want)
        done = again.generate(tokens(1, 5), max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0)
    assert all(type(layer) is PackedLayer for layer in done.past_key_values.layers)


def test_a_run_is_served_from_the_folder_that_says_so(run: Any) -> None:
    folder, _, checkpoint = run
    write_model(
        folder / "exported",
        checkpoint,
        read_weights(folder / "merged"),
        EXPORTERS["compressed-tensors"],
        kv_cache=INT4,
    )
    written = json.loads((folder / "exported" / "config.json").read_text())["quantization_config"]
    assert "kv_cache" not in written and written.get("kv_cache_scheme") is None
    (folder / "recipe.yaml").write_text("name: x\n")
    assert shipped(folder).name == "merged"
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config["quantization_config"].pop("kv_cache") == INT4.to_json()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 2}, "quantization_config.kv_cache.bits: got 2"),
        ({"bits": True}, "kv_cache.bits: got True"),
        ({"kind": "head"}, "kv_cache.kind: got 'head'"),
        ({"symmetric": 1}, "kv_cache.symmetric: got 1"),
        ({"r3": [-1]}, "kv_cache.r3: got [-1]"),
        ({"r3": [0]}, "rotates keys and values by itself"),
        ({"where": "before_rope"}, "set kind: token"),
        ({"more": 1}, "needs an object with bits"),
    ],
)
def test_a_damaged_entry_is_named(change: dict[str, Any], words: str) -> None:
    entry = INT4.to_json()
    assert KVConfig.from_json(entry) == INT4
    with pytest.raises(ValueError) as caught:
        KVConfig.from_json(entry | change)
    assert words in str(caught.value)


def test_no_cache_in_the_recipe_leaves_no_trace(run: Any, tmp_path: Path) -> None:
    _, _, checkpoint = run
    model, _ = quantize(checkpoint, QuantSection.model_validate(QUANT))
    assert kv_config_of(model) is None and not any(m._forward_pre_hooks for m in model.modules())
    merge(model, checkpoint, tmp_path / "merged")
    assert "kv_cache" not in (tmp_path / "merged" / "config.json").read_text()


@pytest.mark.parametrize(
    ("config", "format", "words"),
    [
        (GRIDS[0], "compressed-tensors", "vllm serve F --kv-cache-dtype int8_per_token_head\n"),
        (INT4, "gptq", "vllm serve F --kv-cache-dtype int4_per_token_head\n"),
        (INT4, "gptq", "leave it out on a CPU"),
        (GRIDS[3], "compressed-tensors", "vllm serve F\n"),
        (GRIDS[3], "compressed-tensors", "which this server has no flag for: it keeps them in 16 bits"),
        (GRIDS[2], "compressed-tensors", "R3 in 1 layers, which this server has no flag for"),
        (GRIDS[8], "compressed-tensors", "has no flag for"),
        (GRIDS[8], "gguf", "--cache-type-k q4_0 --cache-type-v q4_0 --flash-attn on\n"),
        (INT4, "mlx", "mlx_lm.server --model F\n"),
        (INT4, "native", "lowbit-ft serve F\n  kv cache: 4 bits by token_head"),
    ],
)
def test_the_serve_line_has_the_flag_of_the_server(config: KVConfig, format: str, words: str) -> None:
    facts = CardFacts("x", "org/base", "lr_qat", True, int_grid(bits=4), "name: x", config)
    assert words in serve_line(facts, format, Path("F"))
    assert "Key-value cache: " in model_card(facts, format, [])
    plain = CardFacts("x", "org/base", "lr_qat", True, int_grid(bits=4), "name: x")
    assert "cache" not in serve_line(plain, format, Path("F")) + model_card(plain, format, [])


def test_a_run_with_a_cache_resumes_bit_equal(tmp_path: Path) -> None:
    from lowbit_ft.kv_cache import place_kv_cache

    def made(seed: int) -> Any:
        model = adapted_llama(adapter_config("lr_qat"), int_grid(group_size=32), seed=seed)
        place_kv_cache(model, INT4)
        return model

    setting: dict[str, Any] = {"max_steps": 4, "save_every": 2}
    straight, _ = go(tmp_path / "a", made(1), batches(), **setting)
    go(tmp_path / "b", made(1), batches(), on_step=stop_at(1), **setting)
    resumed, result = go(tmp_path / "b", made(2), batches(), resume=True, **setting)
    assert result.steps == 4 and equal(adapter_state(straight), adapter_state(resumed))
