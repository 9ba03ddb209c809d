"""This project, as a peer among the others: a recipe on the given rows, and the weights that it would
ship.

options: recipe (dotted keys over the ones below) and train (false: the packed base alone, true: trained and
merged).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from child import Layer, Spec, main

from lowbit_ft import pipeline
from lowbit_ft.export.reader import read_weights
from lowbit_ft.grid import PackedWeight
from lowbit_ft.recipe.recipe import Recipe, load_recipe


def recipe_of(spec: Spec, folder: Path) -> Recipe:
    """The rows as a file of tokens, and a recipe that reads them."""
    ids = spec.ids()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()), encoding="utf-8")
    length = ids.shape[1]
    keys: dict[str, Any] = {
        "name": "peers",
        "model.path": spec.model,
        "model.dtype": "bfloat16",  # as AutoRound computes, and as a recipe that says nothing
        "model.device": "cpu",
        "quant.bits": spec.bits,
        "quant.group_size": spec.group_size,
        "quant.symmetric": spec.symmetric,
        "quant.calibration.samples": len(ids),
        "quant.calibration.sequence_len": length,
        "adapter.method": "lr_qat",
        "data.train.path": str(rows),
        "data.train.format": "tokens",
        "data.sequence_len": length,
        "data.packing": False,
        "train.max_steps": 1,
        "train.micro_batch_size": 8,
        "train.gradient_accumulation_steps": 1,
        "train.seed": spec.seed,
        "eval.window": length,
        "export.format": "native",
        "output": str(folder / "run"),
    }
    merged = keys | spec.options["recipe"]
    file = folder / "recipe.json"
    file.write_text(json.dumps(nested(merged)), encoding="utf-8")  # JSON is YAML
    return load_recipe(file)


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for key, value in keys.items():
        *path, last = key.split(".")
        section = out
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return out


def grid_of(
    scale: torch.Tensor, zero: torch.Tensor | None, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ours [G, N] -> scale and zero [N, G]; an offset T is part of the zero: s (q - z) + T = s (q - (z - T /
    s)).
    """
    assert offset is None, "a recipe with float offsets is not compared here"
    return scale.float().t(), None if zero is None else zero.float().t()


def quantize(spec: Spec) -> tuple[Any, Callable[[], Iterable[Layer]]]:
    folder = tempfile.TemporaryDirectory()
    recipe = recipe_of(spec, Path(folder.name))
    done: dict[str, Any] = {}

    def work() -> None:
        if spec.options["train"]:
            done["folder"] = pipeline.train(recipe)
        else:
            done["folder"] = pipeline.quantize(recipe)

    def layers() -> Iterable[Layer]:
        weights = read_weights(done["folder"])
        for name in weights:
            weight = weights[name]
            assert isinstance(weight, PackedWeight)
            yield name, weight.dequantize(), *grid_of(weight.scale, weight.zero, weight.offset)
        folder.cleanup()

    return work, layers


if __name__ == "__main__":
    main(["lowbit-ft"], quantize)
