"""The whole line for D-FINE, DETR and YOLOS: quantized, trained for two steps, merged, exported, and read by
transformers and ONNX Runtime; from COCO's own annotation files. RT-DETR has tests/tasks/test_detection.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForObjectDetection

from lowbit_ft import pipeline as line
from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.model.images import picture_of, read_processor
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests import detectors, encoders

pytest.importorskip("pycocotools")
STATIC = {"kind": "tensor", "bits": 8, "dynamic": False, "learn": True}
# kind: (packed layers, attention, sections that are not the usual ones)
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "d_fine": (83, "eager", {"quant": {"convolutions": True, "activations": STATIC}}),
    "detr": (26, "eager", {"adapter": {"method": "full_qat"}, "export": {"format": "onnx"}}),
    "yolos": (
        13,
        "sdpa",
        {
            "quant": {"convolutions": True},
            "adapter": {"method": "l4q", "rank": 4},
            "export": {"format": "onnx"},
        },
    ),
}


def recipe(folder: Path, kind: str, attention: str, **changes: Any) -> Path:
    """Labels of the file's own: four categories, of which one is in no picture."""
    model = detectors.detector(folder / "model", kind)
    files = {
        part: detectors.coco(folder / "coco", detectors.rows(8, seed), part)
        for seed, part in enumerate(("train", "valid"))
    }
    content = json.loads(files["train"].read_text())
    content["categories"].insert(0, {"id": 5, "name": "nothing"})
    files["train"].write_text(json.dumps(content))
    data: dict[str, Any] = {part: {"path": str(file)} for part, file in files.items()}
    changes["quant"] = {"group_size": -1, "calibrate": "mse", **changes.get("quant", {})}
    path = data["train"]["path"]
    found = encoders.recipe(
        folder, model, "object_detection", path, model={"attention": attention}, data=data, **changes
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(found))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("kind", list(CASES))
def test_the_whole_line(kind: str, tmp_path: Path) -> None:
    packed, attention, changes = CASES[kind]
    exporter = EXPORTERS[changes.get("export", {"format": "native"})["format"]]
    for modules in (exporter.writes_with, exporter.reads_with):
        if reason := exporter.missing(modules):
            pytest.skip(f"{exporter} {reason}")
    line.run(load_recipe(recipe(tmp_path, kind, attention, **changes)))
    run = tmp_path / "run"
    rows = {row["stage"]: row for row in json.loads((run / "evaluation.json").read_text())["rows"]}
    assert rows["merged"]["loss"] == rows["trained"]["loss"] != rows["quantized"]["loss"]
    assert rows["merged"]["scores"] == rows["trained"]["scores"]
    ships = run / ("merged" if exporter.name == "native" else "exported")
    labels = ["red", "nothing", "blue", "green"]  # by their numbers: 2, 5, 7, 40
    config = json.loads((ships / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(labels)}
    ours: Any = load_exported(run / "merged", dtype=torch.float32, attention=attention).eval()
    assert len(dict(packed_layers(ours))) == packed
    read = AutoModelForObjectDetection.from_pretrained(
        run / "merged", dtype=torch.float32, attn_implementation=attention
    ).eval()
    assert list(read.config.id2label.values()) == labels
    processor = read_processor(run / "merged")
    pictures = [picture_of(row["image"]) for row in detectors.rows(3, seed=7)]
    batch = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found, wanted = ours(pixel_values=batch), read(pixel_values=batch)
        for name in ("logits", "pred_boxes"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        if exporter.name == "onnx":
            graph: Any = load_exported(ships, dtype=torch.float32)
            torch.testing.assert_close(
                graph(pixel_values=batch).pred_boxes, wanted.pred_boxes, rtol=1e-4, atol=1e-5
            )


def test_what_cannot_be_traced_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file = recipe(tmp_path, "d_fine", "eager", export={"format": "onnx"})
    with pytest.raises(RecipeError, match="export.format: got 'onnx': a graph of D-FINE cannot be traced"):
        load_recipe(file)


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine", "detr"])
def test_an_attention_that_it_has_not_is_refused_before_anything_is_loaded(kind: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, kind, "sdpa")
    with pytest.raises(
        RecipeError, match=r"model.attention: got 'sdpa', and \w+Backbone of transf.*set eager"
    ):
        load_recipe(file)
