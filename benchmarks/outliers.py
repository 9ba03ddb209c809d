"""A checkpoint with planted outlier channels, so that a small model has what large ones grow by themselves.

    norms        gain g_j f           columns j of its readers / f
    v_proj       row j f              column of o_proj / f, in every head that reads it
    up_proj      row j f              column j of down_proj / f

The function stays what it is: only where between two weights a channel is large is moved. Factors are powers
of two, so that it stays it to the bit in the weights too. Llama's names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lowbit_ft.files.jsonfile import read_json


def plant(source: Path, target: Path, factor: float = 32.0, channels: int = 3, seed: int = 0) -> Path:
    """Copy a Llama checkpoint of one file to `target` with `channels` outliers at each site of each layer."""
    config: dict[str, Any] = read_json(source / "config.json", dict[str, Any])
    tensors = load_file(source / "model.safetensors")
    drawn = torch.Generator().manual_seed(seed)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads

    def pick(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=drawn)[:channels]

    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            chosen = pick(config["hidden_size"])
            tensors[f"{at}{norm}.weight"][chosen] *= factor
            for reader in readers:
                tensors[f"{at}{reader}.weight"][:, chosen] /= factor
        rows = pick(groups * size)
        tensors[f"{at}self_attn.v_proj.weight"][rows] *= factor
        for row in rows.tolist():
            group, within = divmod(row, size)
            for head in range(group * heads // groups, (group + 1) * heads // groups):
                tensors[f"{at}self_attn.o_proj.weight"][:, head * size + within] /= factor
        rows = pick(config["intermediate_size"])
        tensors[f"{at}mlp.up_proj.weight"][rows] *= factor
        tensors[f"{at}mlp.down_proj.weight"][:, rows] /= factor
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
