"""The shapes plan_error.py asks about: a config.json, a recipe, and how its bytes are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit_ft.recipe.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
QUICK = ROOT / "recipes" / "quickstart.yaml"
PLANES = ["quant.grid=binary", "quant.calibrate=greedy", "export.format=native"]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return LLAMA | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


# name -> (config.json, None: the quickstart's; recipe overrides; how it is counted)
SHAPES: dict[str, tuple[dict[str, Any] | None, list[str], tuple[str, ...]]] = {
    "tiny": (None, ["adapter={method: lr_qat, rank: 16}", "train.micro_batch_size=4"], ("real", "fake")),
    "25m": (
        llama(384, 6, 6, 2, 1152, 8192),
        [
            "adapter={method: l4q, rank: 8}",
            "quant.bits=3",
            "quant.symmetric=false",
            "export.format=native",
            "data.sequence_len=128",
            "train.micro_batch_size=2",
            "train.gradient_accumulation_steps=2",
        ],
        ("real", "fake"),
    ),
    "100m": (
        llama(768, 8, 12, 4, 2048, 32000, tie_word_embeddings=True),
        [
            "adapter={method: dl_qat, rank: 16}",
            "quant.bits=2",
            "quant.group_size=64",
            "model.dtype=bfloat16",
            "export.format=native",
            "data.sequence_len=128",
            "train.micro_batch_size=1",
        ],
        ("real", "fake"),
    ),
    "400m": (
        llama(1024, 24, 16, 8, 4096, 32000),
        [
            "adapter={method: scale}",
            "model.dtype=bfloat16",
            "data.sequence_len=1024",
            "train.micro_batch_size=1",
            "quant.residual_bits=0",
        ],
        ("fake",),
    ),
    "1b": (
        llama(2048, 16, 32, 8, 8192, 128256),
        [
            *PLANES,
            "adapter={method: alpha_tuning}",
            "quant.bits=3",
            "model.dtype=bfloat16",
            "data.sequence_len=2048",
            "train.micro_batch_size=1",
            "train.gradient_accumulation_steps=2",
        ],
        ("fake",),
    ),
}


def recipe_for(shape: str, folder: Path, checkpointing: bool) -> Recipe:
    """The recipe of a shape; its checkpoint is `folder` (config.json alone for shapes that are only counted
    without data).
    """
    config, overrides, _ = SHAPES[shape]
    if config is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        overrides = [*overrides, f"model.path={folder}"]
    overrides = [
        *overrides,
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
        f"output={folder / 'run'}",
    ]
    return load_recipe(QUICK, overrides, check=False)
