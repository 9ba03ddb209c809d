"""Checkpoints that come in, read as a recipe does it, and changed as somebody else's writer might have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lowbit_ft.grid import PackedWeight
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.incoming import resolve_quant
from lowbit_ft.recipe.sections.model import ModelSection
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.incoming_tools import Layer


def resolved(folder: Path, **given: Any) -> QuantSection:
    quant, problems = resolve_quant(ModelSection(path=str(folder)), QuantSection(**given))
    assert problems == []
    return quant


def packed(folder: Path, **given: Any) -> Any:
    return quantize(Checkpoint.open(folder, dtype="float32"), resolved(folder, **given))


def equal(weight: PackedWeight, layer: Layer) -> bool:
    zero = torch.full_like(layer.zero, weight.grid.levels // 2) if weight.zero is None else weight.zero
    return (
        torch.equal(weight.unpack_codes(), layer.codes)
        and torch.equal(weight.scale.float(), layer.scale.float())
        and torch.equal(zero, layer.zero)
    )


def change(folder: Path, **settings: Any) -> None:
    """Change keys of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (folder / "config.json").write_text(json.dumps(config))


def graft(folder: Path, other: Path) -> None:
    """Give the checkpoint in folder the down_proj of another one, as a second config group."""
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, other)]
    groups = [config["quantization_config"]["config_groups"] for config in configs]
    groups[0]["group_1"] = {**groups[1]["group_0"], "targets": ["re:.*down_proj$"]}
    (folder / "config.json").write_text(json.dumps(configs[0]))
    a, b = (load_file(path / "model.safetensors") for path in (folder, other))
    taken = {key: value for key, value in b.items() if "down_proj" in key}
    save_file(a | taken, folder / "model.safetensors")


def rewrite(folder: Path, end: str, make: Any) -> str:
    """Replace the first tensor whose name ends so by make(tensor) (None: drop it)."""
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(tensors) if key.endswith(end))
    value = make(tensors.pop(name))
    save_file(tensors if value is None else tensors | {name: value}, folder / "model.safetensors")
    return name
