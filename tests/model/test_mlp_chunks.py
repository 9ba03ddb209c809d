"""MLP and norms in chunks of tokens: the gradients of the whole, no product more than checkpointing makes,
nothing of inner width kept.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.mlp_chunks import cut_mlps
from lowbit_ft.model.walk import decoder_layers
from lowbit_ft.train.loop import train
from lowbit_ft.train.setup import activation_checkpointing
from tests.model.attention_models import Largest
from tests.packed_tools import random_weights, undrawn
from tests.toy import batches, quiet, section, state

SIZE: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
)
IDS = torch.arange(1, 43).view(2, 21)  # 2 rows of 21 tokens


def packed(method: str, config: Any = None) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config or transformers.LlamaConfig(**SIZE))
    grid = BinaryGrid(group_size=32) if ADAPTERS[method].grid_name == "binary" else IntGrid(group_size=32)
    for name, weight in random_weights(model, grid).items():
        model.set_submodule(name, PackedLinear(weight))
    attach(model, undrawn(method))
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS, use_cache=False).logits
    (out.float() ** 2).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def layers_of(model: Any) -> Any:
    return decoder_layers(model)[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ADAPTERS)
def test_gradients_of_every_method_are_those_of_the_whole(method: str, checkpointing: bool) -> None:
    model = packed(method)
    want = gradients(model)
    activation_checkpointing(model, checkpointing)
    restore = cut_mlps(model, layers_of(model), 16)  # 8 tokens of each row: 3 chunks
    got = gradients(model)
    assert got.keys() == want.keys() and any("mlp" in name for name in want)
    for name, grad in want.items():
        assert (got[name] - grad).abs().max() <= 2e-5 * grad.abs().max(), name
    cut = [n for n, m in model.named_modules() if "forward" in vars(m)]
    norms = [
        "model.norm",
        *(f"model.layers.{i}.{n}" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")),
    ]
    assert sorted(cut) == sorted([*norms, "model.layers.0.mlp", "model.layers.1.mlp"])
    restore()
    assert not [n for n, m in model.named_modules() if "forward" in vars(m)]
    assert all(torch.equal(g, want[n]) for n, g in gradients(model).items()) or checkpointing


def test_it_is_exact_in_float64_and_under_autocast() -> None:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).double()
    for dtype, tolerance in ((None, 1e-12), (torch.bfloat16, 3e-2)):
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            model = model if dtype is None else model.float()
            want = gradients(model)
            activation_checkpointing(model, True)
            restore = cut_mlps(model, layers_of(model), 16)
            got = gradients(model)
            restore()
            activation_checkpointing(model, False)
        for name, grad in want.items():
            assert (got[name] - grad).abs().max() <= tolerance * grad.abs().max(), name


def test_experts_and_a_norm_behind_the_mlp() -> None:
    mixture = transformers.MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2)
    for config in (mixture, transformers.Gemma2Config(**SIZE, head_dim=32)):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        want = gradients(model)
        activation_checkpointing(model, True)
        cut_mlps(model, layers_of(model), 16)
        got = gradients(model)
        assert "forward" in vars(layers_of(model)[0].mlp)
        for name, grad in want.items():
            assert (got[name] - grad).abs().max() <= 3e-5 * grad.abs().max(), name


def test_products_run_as_often_as_with_checkpointing_alone() -> None:
    """In rows of the products: twice (forward, and once more for the backward), not three times."""
    rows: list[int] = []
    for chunk in (None, 16):
        model = packed("lr_qat")
        activation_checkpointing(model, True)
        if chunk:
            cut_mlps(model, layers_of(model), chunk)
        seen: list[int] = []
        layers_of(model)[0].mlp.up_proj.register_forward_hook(
            lambda _m, a, _o, seen=seen: seen.append(a[0].shape[0] * a[0].shape[1])
        )
        gradients(model)
        assert max(seen) == (16 if chunk else 42)
        rows.append(sum(seen))
    assert rows == [2 * 42, 2 * 42]


def test_nothing_is_tokens_x_inner_width() -> None:
    config = transformers.LlamaConfig(
        **SIZE | {"intermediate_size": 4096, "num_hidden_layers": 1, "hidden_size": 16}
    )
    found = []
    for chunk in (None, 16):
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config).requires_grad_(False).train()
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(16))
        activation_checkpointing(model, True)
        if chunk:
            cut_mlps(model, layers_of(model), chunk)
        with Largest() as largest:
            gradients(model)
        found.append(largest.elements)
    assert found[0] == 42 * 4096 and found[1] == 16 * 4096


def test_what_cannot_be_cut_is_refused_or_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dropout = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=23, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    )
    with pytest.raises(
        ValueError,
        match=r"train.mlp_chunk: got 16, but no MLP of GPT2LMHeadModel can be cut \(it has "
        r"dropout\); set it to null",
    ):
        train(dropout, batches(), None, section(mlp_chunk=16), tmp_path / "gpt2", console=quiet())

    assert (
        dropout.config._attn_implementation == "sdpa" and not (tmp_path / "gpt2" / "metrics.jsonl").exists()
    )

    class Mixing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE))
    model.model.layers[0].mlp = Mixing()
    cut_mlps(model, layers_of(model), 16)
    assert "forward" not in vars(model.model.layers[0].mlp) and "forward" in vars(model.model.layers[1].mlp)
    del model.model.layers[0].mlp, model.model.layers[1].mlp
    with pytest.raises(ValueError, match="its layers have none of mlp, feed_forward, ffn"):
        cut_mlps(model, layers_of(model), 16)


def test_a_run_trains_the_same(tmp_path: Path) -> None:
    ends = []
    for chunk in (None, 16):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZE | {"vocab_size": 23})
        ).requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_("layers.0.mlp" in name)
        setting = section(
            mlp_chunk=chunk, gradient_checkpointing=True, offload="cpu", optimizer="adamw", learning_rate=1e-3
        )
        train(model, batches(), batches(seed=1), setting, tmp_path / str(chunk), console=quiet())
        assert "forward" not in vars(model.model.layers[0].mlp)
        ends.append(state(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=2e-5)
