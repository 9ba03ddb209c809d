"""The lines of serve.py's table: server x model x format x grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
SIZE: dict[str, Any] = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,  # so that its answers are not all alike
)
# The trained small Llama, and random models: biases and a tied head; norms of q and k; experts.
LIBRARY: Any = transformers
MODELS: dict[str, Any] = {
    "llama": None,
    "qwen2": lambda **more: LIBRARY.Qwen2Config(**SIZE, tie_word_embeddings=True, **more),
    "qwen3": lambda **more: LIBRARY.Qwen3Config(**SIZE, head_dim=64, **more),
    "qwen3_moe": lambda **more: LIBRARY.Qwen3MoeConfig(
        **SIZE, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, **more
    ),
}


def model_folder(kind: str, place: Path) -> Path:
    """The checkpoint of that kind; a random one is written once, with the tokenizer of the small Llama."""
    if MODELS[kind] is None:
        return TINY
    folder = place / f"model-{kind}"
    if not folder.is_dir():
        tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
        ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        torch.manual_seed(0)
        config = MODELS[kind](vocab_size=len(tokenizer), **ends)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """keys: of the recipe; own: with the server's own kernel; options: of the server's command line."""

    server: str
    model: str
    format: str
    grid: str
    keys: tuple[str, ...]
    own: bool = False
    dtype: str = "float32"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        own = " own kernel" if self.own and self.server == "vllm" else ""
        return f"{self.server} | {self.model} | {self.format} | {self.grid}{own}"


def packed(bits: int, group: int, symmetric: bool = True, *more: str) -> tuple[str, ...]:
    grid = f"quant.bits={bits}", f"quant.group_size={group}", f"quant.symmetric={str(symmetric).lower()}"
    return (*grid, *more)


def grids(*asked: str) -> list[tuple[str, tuple[str, ...]]]:
    """("W4 g64 asym", keys) of each."""
    made = []
    for text in asked:
        bits, group, *rest = text.split()
        size = -1 if group == "rows" else int(group[1:])
        made.append((text, packed(int(bits[1:]), size, "asym" not in rest)))
    return made


A8, A4 = "quant.activations={bits: 8}", "quant.activations={bits: 4}"
A8_GROUPS = "quant.activations={bits: 8, kind: group, group_size: 64}"
A8_ZERO = "quant.activations={bits: 8, symmetric: false}"
CT = "compressed-tensors"
INPUTS = {
    "W2 g64 A8": packed(2, 64, True, A8),
    "W3 g128 A8": packed(3, 128, True, A8),
    "W4 g64 A8": packed(4, 64, True, A8),
    "W4 g64 asym A8": packed(4, 64, False, A8),
    "W4 rows A8": packed(4, -1, True, A8),
    "W4 g64 A8 groups": packed(4, 64, True, A8_GROUPS),
    "W4 g64 A4": packed(4, 64, True, A4),
    "W8 g64 A8": packed(8, 64, True, A8),
}
HALF: dict[str, Any] = {"own": True, "dtype": "float16"}
BF16: dict[str, Any] = {"own": True, "dtype": "bfloat16"}


def _vllm() -> list[Case]:
    """Its own CPU kernels where it has some, else the dequantizing one, and what it refuses."""
    own = grids("W4 g128", "W4 g128 asym", "W4 g32", "W4 g64 asym", "W4 rows")
    cases = [Case("vllm", "llama", CT, grid, keys, **BF16) for grid, keys in own]
    head = packed(4, 64, True, "quant.lm_head=4")
    cases.append(Case("vllm", "llama", CT, "W4 g64, head", head, **BF16))
    int8 = packed(8, -1, True, A8), packed(8, -1, True, A8_ZERO)
    for grid, keys in zip(("W8 rows A8", "W8 rows A8 asym"), int8, strict=True):
        cases.append(Case("vllm", "llama", "int-quantized", grid, keys, own=True))
    others = ("W2 g64", "W2 g64 asym", "W3 g128", "W3 g128 asym", "W4 g32", "W4 rows", "W4 rows asym")
    for grid, keys in [*grids(*others, "W8 g128", "W8 g128 asym"), *INPUTS.items()]:
        cases.append(Case("vllm", "llama", CT, grid, keys))
    for grid, keys in grids("W2 g64", "W3 g128 asym", "W8 g128"):  # refused on a CPU
        cases.append(Case("vllm", "llama", CT, grid, keys, **BF16))
    for format, asked in {
        "gptq": ("W4 g128", "W4 g32", "W3 g128", "W8 g128"),
        "gptq_v2": ("W4 g128", "W4 g64 asym"),
        "awq": ("W4 g128 asym", "W4 g32"),
    }.items():
        cases += [Case("vllm", "llama", format, grid, keys, **HALF) for grid, keys in grids(*asked)]
    for model in ("qwen2", "qwen3"):
        for grid, keys in grids("W4 g64", "W4 g128 asym"):
            cases.append(Case("vllm", model, CT, grid, keys, **BF16))
        for grid, keys in grids("W2 g64", "W3 g64 asym", "W8 g128"):
            cases.append(Case("vllm", model, CT, grid, keys))
        for format, asked in {"gptq": "W4 g128", "awq": "W4 g64 asym"}.items():
            cases += [Case("vllm", model, format, grid, keys, **HALF) for grid, keys in grids(asked)]
    cases += [Case("vllm", "qwen3_moe", CT, grid, keys, **BF16) for grid, keys in grids("W4 g64")]
    for bits in (8, 4):  # a flag of its GPU attention
        keys, flags = packed(4, 128), ("--kv-cache-dtype", f"int{bits}_per_token_head")
        cases.append(
            Case(
                "vllm http", "llama", CT, f"W4 g128 KV{bits}", keys, own=True, dtype="bfloat16", options=flags
            )
        )
    return cases


def _http() -> list[Case]:
    chosen = ("llama", CT, "W4 g128"), ("qwen2", "gptq", "W4 g128"), ("qwen3", "awq", "W4 g64 asym")
    return [
        Case("vllm http", model, format, grid, keys, **(BF16 if format == CT else HALF))
        for model, format, asked in chosen
        for grid, keys in grids(asked)
    ]


def _llama_cpp() -> list[Case]:
    """Its caches by the flags of our serve line, which the run's quant.kv_cache prints."""
    asked = {
        "llama": ("W4 g128", "W4 g32", "W3 g128", "W2 g64", "W8 g128"),
        "qwen2": ("W4 g64", "W2 g64"),
        "qwen3": ("W4 g64", "W2 g64"),
    }
    cases = [
        Case("llama.cpp", model, "gguf", grid, keys, own=True)
        for model, listed in asked.items()
        for grid, keys in grids(*listed)
    ]
    for model, bits in (("llama", 8), ("llama", 4), ("qwen3", 8), ("qwen3", 4)):
        keys = packed(4, 128, True, f"quant.kv_cache={{bits: {bits}, kind: block}}")
        cases.append(Case("llama.cpp", model, "gguf", f"W4 g128 KV{bits}", keys, own=True))
    return cases


CASES: dict[str, Case] = {case.name: case for case in (*_vllm(), *_http(), *_llama_cpp())}
