"""Tiny GPTQ, AWQ and compressed-tensors checkpoints, written from the public description of each layout, one
bit at a time.

Nothing of ours packs here: a mistake in our bit streams must not be on both sides of a comparison.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.packed_tools import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Layer:
    """codes uint8 [N, K], scale [G, N] as stored, zero uint8 [G, N] (the middle when symmetric)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int

    def dense(self) -> Tensor:
        size = self.codes.shape[1] if self.group_size == -1 else self.group_size
        spread = [
            t.t().float().repeat_interleave(size, dim=1)[:, : self.codes.shape[1]]
            for t in (self.scale, self.zero)
        ]
        return (self.codes.float() - spread[1]) * spread[0]


def bits_of(values: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] unsigned -> int32 [R, C bits / 32]: a bit stream, lowest bit first."""
    stream = ((values[..., None].astype(np.int64) >> np.arange(bits)) & 1).reshape(len(values), -1, 32)
    words = (stream << np.arange(32)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def round_weight(weight: Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> Layer:
    """Round to nearest: what a quantizer of another library might write."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    groups = weight.float().view(n, k // size, size)
    top = (1 << bits) - 1
    if symmetric:
        scale = groups.abs().amax(-1) / (top / 2)
        zero = torch.full_like(scale, 1 << (bits - 1))
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(1, top)
    scale = scale.to(dtype)
    codes = (groups / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, top)
    return Layer(
        codes.view(n, k).to(torch.uint8),
        scale.t().contiguous(),
        zero.t().contiguous().to(torch.uint8),
        group_size,
    )


def quantized_checkpoint(
    folder: Path,
    method: str,
    *,
    source: Path | None = None,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    settings: dict[str, Any] | None = None,
    names: tuple[str, ...] = PROJECTIONS,
) -> dict[str, Layer]:
    """Write `folder` from a dense checkpoint (default: a random tiny Llama); returns what is in it, by
    layer.
    """
    if source is None:
        source = tiny_checkpoint(folder.parent / f"{folder.name}-dense")
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors, out, layers = load_file(folder / "model.safetensors"), {}, {}
    version = (settings or {}).get("checkpoint_format", "gptq")
    for key, value in tensors.items():
        layer = key.removesuffix(".weight")
        if layer.rpartition(".")[2] not in names:
            out[key] = value
            continue
        layers[layer] = made = round_weight(value, bits, group_size, symmetric, scale_dtype)
        for local, tensor in packed_tensors(method, made, bits, symmetric, version).items():
            out[f"{layer}.{local}"] = tensor
    config["quantization_config"] = method_settings(method, bits, group_size, symmetric) | (settings or {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    return layers


def packed_tensors(method: str, layer: Layer, bits: int, symmetric: bool, version: str) -> dict[str, Tensor]:
    codes, zero = layer.codes.numpy(), layer.zero.numpy()
    if method == "gptq":
        stored = zero.astype(np.int64) - (1 if version == "gptq" else 0)
        size = codes.shape[1] if layer.group_size == -1 else layer.group_size
        return {
            "qweight": torch.from_numpy(bits_of(codes, bits).T.copy()),
            "qzeros": torch.from_numpy(bits_of(stored, bits).copy()),
            "scales": layer.scale.clone(),
            "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // size,
        }
    if method == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        mixed = [a.reshape(len(a), -1, 8)[..., order].reshape(len(a), -1) for a in (codes.T, zero)]
        return {
            "qweight": torch.from_numpy(bits_of(mixed[0], 4).copy()),
            "qzeros": torch.from_numpy(bits_of(mixed[1], 4).copy()),
            "scales": layer.scale.clone(),
        }
    out = {
        "weight_packed": torch.from_numpy(bits_of(codes, bits).copy()),
        "weight_scale": layer.scale.t().contiguous(),
        "weight_shape": torch.tensor(codes.shape),
    }
    if not symmetric:
        out["weight_zero_point"] = torch.from_numpy(bits_of(zero, bits).T.copy())
    return out


def method_settings(method: str, bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    if method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq",
        }
    if method == "awq":
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }
    row = group_size == -1
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if row else "group",
        "group_size": None if row else group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
