"""gguf: transformers reads what is written with equal logits, and a model that llama.cpp computes otherwise
is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit_ft.export import LayerSpec
from lowbit_ft.export.gguf import block_type
from lowbit_ft.export.gguf_model import reject, rope_divisors
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import check_model, write_model
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from tests.export.common import GGUF, GRIDS, TINY, checkpoint
from tests.packed_tools import IDS, int_grid, packed_model, random_weight, random_weights, set_packed


def eager(source: Checkpoint, weights: dict[str, Any]) -> Any:
    """`packed_model` for models that have no sdpa attention."""
    return set_packed(load_model(source, "eager"), weights).eval()


def test_gguf_takes_the_smallest_block_type_that_is_exact() -> None:
    names = {(g.bits, g.group_size): block_type(g, 768).name for g in GRIDS if g.symmetric}
    assert {n for (bits, _), n in names.items() if bits == 8} == {"Q8_0"}
    assert {n for (bits, _), n in names.items() if bits == 4} == {"Q4_0"}
    assert names[3, 128] == names[2, 64] == "Q4_0"
    assert names[6, 64] == "Q8_0" and names[6, 256] == "Q6_K"
    assert names[3, 256] == names[3, -1] == "Q3_K" and names[2, 256] == names[2, -1] == "Q2_K"
    assert block_type(int_grid(bits=3, group_size=-1), 96).name == "Q4_0"  # no whole block of 256


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.symmetric], ids=str)
def test_transformers_reads_gguf_with_equal_logits(grid: Any, wide: Checkpoint, tmp_path: Path) -> None:
    weights = random_weights(wide.empty_model(), grid)
    write_model(tmp_path / "m", wide, weights, GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", gguf_file="model.gguf", dtype=torch.float32
    )
    assert torch.equal(model.eval()(IDS).logits, packed_model(wide, weights)(IDS).logits)
    assert verify(tmp_path / "m", weights).ok


GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
ARCHITECTURES: dict[str, Any] = {
    "llama, biases": transformers.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama, rope of llama 3": transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3),
    "llama, linear rope": transformers.LlamaConfig(
        **TINY, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=8.0)
    ),
    "llama, tied": transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**TINY),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=32),
    "gemma2": transformers.Gemma2Config(**TINY, **GEMMA),
    "gemma3": transformers.Gemma3TextConfig(**(TINY | dict(num_hidden_layers=7)), **GEMMA),
}


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_architectures_of_gguf(kind: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", ARCHITECTURES[kind])
    model = source.empty_model("eager")
    weights = random_weights(model, {"down_proj": int_grid(bits=8), "": int_grid()})
    if "tied" in kind:
        weights["lm_head"] = random_weight((4096, 256), int_grid(bits=8))
    write_model(tmp_path / "m", source, weights, GGUF)
    loaded = load_exported(tmp_path / "m", attention="eager")
    assert torch.equal(loaded(IDS).logits, eager(source, weights)(IDS).logits)
    if "tied" in kind:
        assert not loaded.config.tie_word_embeddings


def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path: Path) -> None:
    def told(words: str, config: Any) -> None:
        problems = reject(config.to_dict())
        assert len(problems) == 1 and words in problems[0] and "native" in problems[0], problems

    told("'opt'", transformers.OPTConfig())
    told("sliding window", transformers.MistralConfig(**TINY))
    told("silu", transformers.LlamaConfig(**TINY, hidden_act="gelu"))
    told(
        "'yarn'",
        transformers.LlamaConfig(**TINY, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)),
    )
    told("'llama3'", transformers.Qwen2Config(**TINY, rope_parameters=LLAMA3))
    told(
        "query_pre_attn_scalar", transformers.Gemma2Config(**TINY, **(GEMMA | dict(query_pre_attn_scalar=99)))
    )
    told(
        "final_logit_softcapping", transformers.Gemma3TextConfig(**TINY, **GEMMA, final_logit_softcapping=9.0)
    )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        told(f"{key} null", transformers.Gemma2Config(**TINY, **GEMMA, **{key: None}))
    told("46 layers", transformers.Gemma2Config(**(TINY | dict(num_hidden_layers=46)), **GEMMA))
    assert all(reject(config.to_dict()) == [] for config in ARCHITECTURES.values())
    source = checkpoint(tmp_path / "c", transformers.MistralConfig(**TINY))
    with pytest.raises(ValueError, match=r"(?s)gguf cannot hold this model.*sliding window"):
        check_model(source, {"model.layers.0.mlp.up_proj": LayerSpec((256, 256), int_grid())}, GGUF)


def test_the_rope_divisors_are_those_of_transformers() -> None:
    config = transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3)
    inverse, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    divisors = rope_divisors(config.to_dict())
    assert (
        divisors is not None
        and torch.allclose(plain / divisors, inverse, rtol=1e-5)
        and len(set(divisors.tolist())) > 2
    )
    assert rope_divisors(transformers.LlamaConfig(**TINY).to_dict()) is None


def test_verify_finds_a_changed_bit_in_a_gguf_file(wide: Checkpoint, tmp_path: Path) -> None:
    weights = random_weights(wide.empty_model(), int_grid(bits=3))
    write_model(tmp_path / "m", wide, weights, GGUF)
    layer = "model.layers.0.self_attn.q_proj"  # whose rows are stored in another order
    codes = weights[layer].codes.clone()
    codes[5, 3] ^= 1
    damaged = dict(weights) | {
        layer: type(weights[layer])(
            codes=codes, scale=weights[layer].scale, shape=(256, 256), grid=weights[layer].grid
        )
    }
    with pytest.raises(
        ValueError, match=rf"(?s)1 of 7 layers differ.*{layer}: 1 codes, 0 scales and zero points, 1 weights"
    ):
        verify(tmp_path / "m", damaged)
    with pytest.raises(ValueError, match="logits: largest difference"):
        verify(tmp_path / "m", weights, model=packed_model(wide, damaged))
