"""Tiny models and the grids that are tried on them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from lowbit_ft.kv_cache import KVConfig

SIZE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
)
GRIDS = [
    KVConfig.of(8, "token_head"),
    KVConfig.of(4, "token_head"),
    KVConfig.of(4, "token_head", rotate=False, r3=[1]),
    KVConfig.of(4, "token_head", symmetric=True),
    KVConfig.of(8, "token_head", symmetric=False),
    KVConfig.of(8, "token"),
    KVConfig.of(4, "token", symmetric=False, r3=[0, 1]),
    KVConfig.of(8, "block"),
    KVConfig.of(4, "block"),
]
BEFORE = KVConfig.of(4, "token", "before_rope")
SPREAD = [GRIDS[0], GRIDS[1], GRIDS[2], GRIDS[8]]  # one of each code path, for what costs a model


def llama(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SIZE | changes))
    return transformers.LlamaForCausalLM._from_config(
        config, attn_implementation=attention, dtype=dtype
    ).eval()


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))
