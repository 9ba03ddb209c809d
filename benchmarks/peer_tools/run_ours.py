"""This project, as a peer among the others: a recipe on the given rows, and the weights that it would
ship.

options: recipe (dotted keys over the ones below), train (false: the packed base alone, true: trained and
merged) and full_qat (true: every dense weight is trained behind the grid, benchmarks/full_qat.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from child import Layer, Spec, main

from benchmarks.full_qat import FullQATLinear
from lowbit_ft import pipeline
from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.export.reader import read_weights
from lowbit_ft.grid import PackedWeight
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.session import start
from lowbit_ft.stages.data import batches, read_data
from lowbit_ft.stages.quantize import quantize_stage
from lowbit_ft.stages.teacher import lesson_of
from lowbit_ft.train.loop import train


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


def full_qat(recipe: Recipe) -> list[Layer]:
    """Every dense weight trained behind its grid, from where the calibrator left it before rounding."""
    with start(recipe) as session:
        examples = read_data(session)
        model = quantize_stage(session)
        torch.manual_seed(recipe.train.seed)
        model.requires_grad_(False)
        for name, layer in list(packed_layers(model)):
            assert isinstance(layer.base, PackedWeight)
            model.set_submodule(name, FullQATLinear(layer, layer.base.dequantize_unrounded()))
        lesson, size = lesson_of(session, model, examples, None), recipe.train.micro_batch_size
        order = batches(session, model, examples, size, shuffle=True, taught=lesson.teacher is not None)
        train(model, order, None, recipe.train, session.run.path, lesson=lesson, console=session.console)
    out = []
    for name, layer in model.named_modules():
        if isinstance(layer, FullQATLinear):
            with torch.no_grad():
                scale = (layer.base.scale.float() * layer.log_scale.exp()).to(layer.base.scale.dtype)
                out.append((name, layer.weight(), *grid_of(scale, layer.base.zero, None)))
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
        if spec.options.get("full_qat"):
            done["layers"] = full_qat(recipe)
        elif spec.options["train"]:
            done["folder"] = pipeline.train(recipe)
        else:
            done["folder"] = pipeline.quantize(recipe)

    def layers() -> Iterable[Layer]:
        if "layers" in done:
            yield from done["layers"]
        else:
            weights = read_weights(done["folder"])
            for name in weights:
                weight = weights[name]
                assert isinstance(weight, PackedWeight)
                yield name, weight.dequantize(), *grid_of(weight.scale, weight.zero, weight.offset)
        folder.cleanup()

    return work, layers


if __name__ == "__main__":
    main(["lowbit-ft"], quantize)
