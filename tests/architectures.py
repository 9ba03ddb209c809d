"""Tiny random models of every architecture we say something about, and the whole line on one of them.

`CONFIGS` is the list; `line` is what tests/test_architectures.py asserts and what benchmarks/support_matrix.py writes into
docs/models.md. A model has hidden size 64 and two layers: wide enough for groups of 32, small enough for a second each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from lowbit_ft.adapters import LRQATConfig
from lowbit_ft.attach import adapted_layers, attach, begin_step
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.load import Checkpoint, model_class
from lowbit_ft.merge import merge, merged_weights
from lowbit_ft.quantize import quantize
from lowbit_ft.recipe import QuantSection

SIZE: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA: dict[str, Any] = SIZE | dict(intermediate_size=96, num_key_value_heads=2)
EXPERTS: dict[str, Any] = LLAMA | dict(num_experts_per_tok=2)
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
)  # fmt: skip


def _of(name: str, fields: dict[str, Any], **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**(fields | more))


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _of("LlamaConfig", LLAMA),
    "mistral": _of("MistralConfig", LLAMA, head_dim=16),
    "qwen2": _of("Qwen2Config", LLAMA),
    "qwen3": _of("Qwen3Config", LLAMA, head_dim=16),
    "gemma2": _of("Gemma2Config", LLAMA, head_dim=16),
    "gemma3": _of("Gemma3TextConfig", LLAMA, head_dim=16, sliding_window=8),
    "phi3": _of("Phi3Config", LLAMA),
    "opt": _of("OPTConfig", SIZE, ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": _of("GPTNeoXConfig", SIZE, intermediate_size=96),
    "falcon": _of("FalconConfig", SIZE, num_kv_heads=2, new_decoder_architecture=True),
    "olmo2": _of("Olmo2Config", LLAMA),
    "stablelm": _of("StableLmConfig", LLAMA),
    "glm": _of("GlmConfig", LLAMA, head_dim=16),
    "glm4": _of("Glm4Config", LLAMA, head_dim=16),
    "granite": _of("GraniteConfig", LLAMA),
    "cohere": _of("CohereConfig", LLAMA),
    "smollm3": _of("SmolLM3Config", LLAMA),
    "starcoder2": _of("Starcoder2Config", LLAMA),
    "phi": _of("PhiConfig", LLAMA),
    "gpt2": _of("GPT2Config", SIZE),
    "gpt_bigcode": _of("GPTBigCodeConfig", SIZE),
    "bloom": _of("BloomConfig", SIZE),
    "mixtral": _of("MixtralConfig", EXPERTS, num_local_experts=4),
    "qwen2_moe": _of(
        "Qwen2MoeConfig", EXPERTS, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "qwen3_moe": _of("Qwen3MoeConfig", EXPERTS, num_experts=4, moe_intermediate_size=32, head_dim=16),
    "olmoe": _of("OlmoeConfig", EXPERTS, num_experts=4),
    "phimoe": _of("PhimoeConfig", EXPERTS, num_local_experts=4),
    "gpt_oss": _of("GptOssConfig", EXPERTS, num_local_experts=4, head_dim=16, sliding_window=8),
    "granitemoe": _of("GraniteMoeConfig", EXPERTS, num_local_experts=4),
    "deepseek_v3": _of(
        "DeepseekV3Config", EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1,
        n_shared_experts=1, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    ),
}


@dataclass(frozen=True)
class Result:
    """One row of docs/models.md. packed: share of the matrix weights of the decoder layers that are packed, in percent."""

    name: str
    model: str
    layers: int
    packed: float
    native: str
    compressed: str
    note: str = ""


def checkpoint_of(config: Any, folder: Path, dtype: str = "float32") -> Checkpoint:
    """A random checkpoint in bfloat16. Biases, which transformers starts at zero, get values; so a lost one is seen."""
    torch.manual_seed(0)
    model: Any = model_class(config).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return Checkpoint.open(folder, dtype=dtype)


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, length), generator=generator)


def train_one_step(model: Any, steps: int = 1) -> None:
    """attach LR-QAT and take real optimizer steps on random tokens; large ones, so that codes move."""
    attach(model, LRQATConfig(rank=4, alpha=4.0))  # pyright: ignore[reportCallIssue]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in adapted_layers(model):  # B starts at zero, where one step cannot reach A
            layer.adapter.B.normal_(std=0.05, generator=generator)  # pyright: ignore[reportOptionalMemberAccess]
    model.train()
    for step in range(steps):
        begin_step(model, step)
        ids = tokens()
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
