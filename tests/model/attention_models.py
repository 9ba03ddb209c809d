"""Small models of every attention a CPU has, and packed windows for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_ft.data.windows import Example

CPU = torch.device("cpu")
SIZE: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
WIDE = SIZE | {"head_dim": 8}
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Gemma's norms, and the scores of a capped or sunk softmax, are float32 in any dtype: those models are
# compared to 1e-6.
FAMILIES: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (lambda: transformers.LlamaConfig(**SIZE), True),
    "llama 3 positions": (lambda: transformers.LlamaConfig(**SIZE, rope_parameters=LLAMA3), True),
    "yarn": (
        lambda: transformers.LlamaConfig(**SIZE, rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0}),
        True,
    ),
    "mistral": (lambda: transformers.MistralConfig(**SIZE, sliding_window=3), True),
    "qwen2, one layer in a window": (
        lambda: transformers.Qwen2Config(
            **SIZE, sliding_window=3, use_sliding_window=True, max_window_layers=1
        ),
        True,
    ),
    "qwen3": (lambda: transformers.Qwen3Config(**WIDE), True),
    "phi3": (lambda: transformers.Phi3Config(**SIZE, sliding_window=3), True),
    "opt": (
        lambda: transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            dropout=0.0,
            max_position_embeddings=64,
        ),
        True,
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(**WIDE, sliding_window=3, query_pre_attn_scalar=8),
        False,
    ),
    "gemma2, capped": (
        lambda: transformers.Gemma2Config(
            **WIDE, sliding_window=3, query_pre_attn_scalar=8, attn_logit_softcapping=0.5
        ),
        False,
    ),
    "mixtral": (
        lambda: transformers.MixtralConfig(**SIZE, num_local_experts=2),
        False,
    ),  # no grouped product in float64
    "gpt_oss, sinks": (
        lambda: transformers.GptOssConfig(
            **WIDE, sliding_window=3, num_local_experts=2, num_experts_per_tok=1
        ),
        False,
    ),
}
LENGTHS = [[5, 9, 1], [11]]  # a packed row, and one with padding behind it


def model_of(family: str, kind: str = "") -> Any:
    config, exact = FAMILIES[family]
    torch.manual_seed(0)
    for attend_by in (kind, "sdpa", "eager"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation=attend_by)
            break
        except ValueError:
            continue
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # large enough that who sees whom shows
            parameter.add_(torch.randn_like(parameter) * (1.0 if name.endswith("sinks") else 0.1))
    return (model.double() if exact else model).train()


def examples() -> list[Example]:
    g = torch.Generator().manual_seed(1)
    out = []
    for lengths in LENGTHS:
        ids = torch.randint(1, 97, (sum(lengths),), generator=g).tolist()
        labels = [i if k % 3 else -100 for k, i in enumerate(ids)]
        for start in torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist():
            labels[start] = -100
        out.append(Example(ids, labels, lengths))
    return out


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [
                self.elements,
                *(
                    t.untyped_storage().nbytes() // t.itemsize
                    for t in tree_leaves(out)
                    if isinstance(t, torch.Tensor)
                ),
            ]
        )
        return out
