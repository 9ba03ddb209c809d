"""rank_pattern and alpha_pattern: PEFT's own choice of layers, the law on each, the folder, resume, plan
and the recipe check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, adapter_state, attach, base_digest, load_adapter_state
from lowbit_ft.data.batches import Batches
from lowbit_ft.integrations.adapter_files import adapter_options, read_adapter, write_adapter
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.plan.model import skeleton
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.train.loop import train
from tests.integrations.peft_models import logits, packed_model
from tests.integrations.peft_models import train as quick
from tests.packed_tools import nudge
from tests.recipe.recipe_text import GOOD, TINY, problems_with, write
from tests.toy import equal, examples, quiet, section, state

RANKS = {"layers.0.self_attn.q_proj": 7, r"layers\.\d+\.mlp\.(up|gate)_proj": 3, "down_proj": 1}
ALPHAS = {"q_proj": 2.5, r"layers\.1\..*": 64.0}
RANKED = [method for method, config in ADAPTERS.items() if "rank_pattern" in config.model_fields]


def config_of(method: str) -> Any:
    alphas = {"alpha_pattern": ALPHAS} if "alpha_pattern" in ADAPTERS[method].model_fields else {}
    return ADAPTERS[method](method=method, rank=4, rank_pattern=RANKS, **alphas)  # pyright: ignore


def test_the_layers_and_gains_are_those_of_peft() -> None:
    """The same patterns on a dense model through PEFT's LoraConfig: rank and alpha of every layer."""
    model = packed_model()
    attach(model, config_of("lr_qat"))
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    small |= {"num_hidden_layers": 2}
    dense = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **small))
    theirs: Any = get_peft_model(
        dense,
        LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", rank_pattern=RANKS, alpha_pattern=ALPHAS),
    )
    ranks = set()
    for name, layer in adapted_layers(model):
        other = theirs.base_model.model.get_submodule(name)
        assert len(layer.adapter.A) == other.r["default"] == layer.adapter.B.shape[1]  # pyright: ignore
        assert layer.adapter.config.gain == other.scaling["default"]  # pyright: ignore
        ranks.add(other.r["default"])
    assert ranks == {7, 4, 3, 1}


@pytest.mark.filterwarnings("ignore:lora. the merge rounds again")
@pytest.mark.parametrize("method", RANKED)
def test_the_law_holds_and_the_folder_is_read_back(method: str, tmp_path: Path) -> None:
    assert len(RANKED) >= 5
    config, model = config_of(method), packed_model()
    attach(model, config)
    moved = 0
    for name, layer in adapted_layers(model):
        adapter: Any = layer.adapter
        assert (len(adapter.A) == 7) == (name == "model.layers.0.self_attn.q_proj")
        with torch.no_grad():
            for p in adapter.parameters():
                nudge(p, 0.1, config)
        merged = adapter.merge(layer.base)
        moved += not torch.equal(merged.dequantize(), layer.base.dequantize())
        if config.exact_merge:
            assert torch.equal(adapter(torch.eye(layer.in_features), layer.base), merged.dequantize().t())
    assert moved >= 10
    model.config.save_pretrained(tmp_path / "base")
    digest = base_digest(model)
    folder = write_adapter(tmp_path / "adapter", adapter_state(model), config, digest, tmp_path / "base")
    again, tensors, _ = read_adapter(folder)
    assert again == config
    fresh = packed_model()
    attach(fresh, again)
    load_adapter_state(fresh, tensors)
    assert torch.equal(logits(fresh), logits(model))


def test_a_run_resumes_bit_equal(tmp_path: Path) -> None:
    def go(model: Any, **more: Any) -> None:
        data = Batches(examples(9), 2, 0, 0)
        settings = section(max_steps=3, gradient_accumulation_steps=1, save_every=1)
        train(model, data, None, settings, tmp_path, console=quiet(), **more)

    model = packed_model()
    attach(model, config_of("lr_qat"))
    go(model)
    (tmp_path / "checkpoints" / "step-00000003").rename(tmp_path / "gone")
    again = packed_model()
    attach(again, config_of("lr_qat"))
    go(again, resume=True)
    assert equal(state(again), state(model))


def test_through_peft(tmp_path: Path) -> None:
    model: Any = get_peft_model(
        packed_model(), LowBitConfig(method="lr_qat", rank=4, rank_pattern=RANKS, alpha_pattern=ALPHAS)
    )
    a = {n: len(p) for n, p in model.named_parameters() if n.endswith("A.default") or n.endswith(".A")}
    assert set(a.values()) == {7, 4, 3, 1}
    quick(model)
    model.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())["options"]
    assert options["rank_pattern"] == [list(pair) for pair in RANKS.items()], "in their order"
    assert options["alpha_pattern"] == [list(pair) for pair in ALPHAS.items()]
    again = PeftModel.from_pretrained(packed_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not {"rank_pattern", "alpha_pattern"} & adapter_options(ADAPTERS["lr_qat"](method="lr_qat")).keys()
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_layer_is_refused_in_python(key: str) -> None:
    words = f"{key}: got 'q_porj', which matches no layer that trains; did you mean 'q_proj'"
    given: dict[str, Any] = {key: {"v_proj": 2, "q_porj": 8}}
    with pytest.raises(ValueError, match=f"LowBitConfig: {words}"):
        get_peft_model(packed_model(), LowBitConfig(method="lr_qat", rank=4, **given))
    with pytest.raises(ValueError, match=f"{key}: got 'v_proj', which matches no layer that trains"):
        get_peft_model(packed_model(), LowBitConfig(method="lr_qat", target_modules=["q_proj"], **given))
    with pytest.raises(ValueError, match=f"adapter.{words}"):
        attach(packed_model(), ADAPTERS["lr_qat"].model_validate({"rank": 4, **given}))


def test_the_recipe_says_what_matches_nothing_and_plan_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert problems_with(GOOD, ("adapter.rank_pattern={q_proj: 32, '*.mlp.*': 4}",)) == []
    for override, words in (
        ("adapter.rank_pattern={q_porj: 32}", "q_porj', which matches no layer that trains"),
        ("adapter.rank_pattern={q_proj: 0}", "greater than or equal to 1"),
        ("adapter.alpha_pattern={q_proj: -1}", "greater than 0"),
    ):
        found = problems_with(GOOD, (override,))
        assert any(words in line for line in found), found
    plain = skeleton(load_recipe(write(GOOD)), TINY)
    more = skeleton(load_recipe(write(GOOD), ("adapter.rank_pattern={q_proj: 32}",)), TINY)
    queries = [row for row in plain.rows if row.layer.endswith("q_proj")]
    wider = sum(24 * (row.in_features + row.out_features) for row in queries)
    assert queries and more.trainable - plain.trainable == wider
