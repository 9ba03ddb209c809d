"""Small random checkpoints of several architectures, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TINY = Path(__file__).parents[1] / "recipes" / "assets" / "tiny-llama"

SIZE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

GQA = SIZE | {"num_key_value_heads": 2}

MODELS = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "llama3-rope": lambda: transformers.LlamaConfig(**GQA, rope_parameters=LLAMA3_ROPE),
    "qwen2-tied": lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**GQA, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GQA, head_dim=8),
    "opt": lambda: transformers.OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral-fused-experts": lambda: transformers.MixtralConfig(**GQA, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **GQA, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
    ),
}


def random_checkpoint(folder: Path, config: Any, shard: str = "5GB", base_only: bool = False) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    (model.base_model if base_only else model).save_pretrained(folder, max_shard_size=shard)
    return folder


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
