"""The whole line for models of images beside ViT: those that attend to patches or windows, and convolutional
ones."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification, ImageGPTConfig, PvtConfig

from lowbit_ft import pipeline as line
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.images import picture_of, pixels, read_processor
from lowbit_ft.model.load import load_model
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.stages.teacher import refuse_drawn
from lowbit_ft.tasks import TASKS
from tests import encoders, images

TASK = TASKS["image_classification"].model_validate({"kind": "image_classification", "labels": images.LABELS})
TEACHER = {"signal": {"kind": "mix", "temperature": 2}, "teacher": "residual"}
# (packed layers, sections that are not the usual ones)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "deit": (12, {"train": TEACHER}),
    "beit": (
        12,
        {"quant": {"activations": {"kind": "token", "bits": 8}}, "adapter": {"method": "l4q", "rank": 4}},
    ),
    "swin": (13, {"adapter": {"method": "full_qat"}}),
    "convnext": (8, {"quant": {"convolutions": True}}),
    "resnet": (7, {"quant": {"convolutions": True}, "adapter": {"method": "full_qat"}}),
}


def recipe(folder: Path, kind: str, **changes: Any) -> Path:
    rows = str(images.folder_of(folder / "pictures", images.rows(16), "train"))
    # a Swin comes with a head for other labels
    model = images.checkpoint(
        folder / "model", kind, head=kind in ("deit", "swin"), labels=5 if kind == "swin" else 2
    )
    found = encoders.recipe(folder, model, TASK.model_dump(), rows, data={"sequence_len": 17}, **changes)
    found["quant"]["group_size"] = -1
    if kind in images.CONVOLUTIONAL:
        found["model"]["attention"] = "eager"
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_for_other_labels_is_drawn_anew(labels: int, tmp_path: Path) -> None:
    """An ImageNet classifier learns two labels, as by transformers' ignore_mismatched_sizes."""
    folder = images.checkpoint(tmp_path / "model", "vit", head=True, labels=labels)
    came = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    opened = Checkpoint.open(folder, dtype="float32", purpose=TASK.purpose(3))
    made = load_model(opened, "eager").state_dict()
    other = {"classifier.weight", "classifier.bias"} if labels == 5 else set()
    assert set(opened.relabelled) == set(opened.drawn) == other
    assert made["classifier.weight"].shape == (2, 32) and made["classifier.weight"].any()
    for name, value in made.items():
        assert name in other or torch.equal(value, came[name]), name
    again = load_model(Checkpoint.open(folder, dtype="float32", purpose=TASK.purpose(3)), "eager")
    assert torch.equal(again.state_dict()["classifier.weight"], made["classifier.weight"])
    with pytest.raises(ValueError, match="drawn at random") if other else nullcontext():
        refuse_drawn(str(folder), opened)
    alone = TASK.model_copy(update={"train_head": False}).purpose(3)  # nothing would learn to answer
    with pytest.raises(CheckpointError, match="other labels") if other else nullcontext():
        load_model(Checkpoint.open(folder, dtype="float32", purpose=alone), "eager")


@pytest.mark.parametrize("kind", list(CASES))
def test_the_whole_line(kind: str, tmp_path: Path) -> None:
    packed, changes = CASES[kind]
    line.run(load_recipe(recipe(tmp_path, kind, **changes)))
    run = tmp_path / "run"
    rows = {row["stage"]: row for row in json.loads((run / "evaluation.json").read_text())["rows"]}
    assert rows["merged"]["loss"] == rows["trained"]["loss"] != rows["quantized"]["loss"]
    weights = read_weights(run / "merged")
    assert len(weights) == packed and not any("classifier" in name for name in weights)
    read = AutoModelForImageClassification.from_pretrained(
        run / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = load_exported(run / "merged", dtype=torch.float32, attention="eager").eval()
    processor = read_processor(run / "merged")
    batch = torch.stack([pixels(processor, picture_of(row["image"])) for row in images.rows(4, seed=3)])
    with torch.no_grad():
        assert torch.equal(read(pixel_values=batch).logits, ours(pixel_values=batch).logits)
    if "train" in changes:
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx((first["labels_loss"] + first["logits_loss"]) / 2, rel=1e-5)
        assert json.loads((run / "teacher.json").read_text())["tokens"] == 16, "images"


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    purpose = TASK.purpose(0)
    assert purpose is not None
    with pytest.raises(CheckpointError, match="ImageGPT.*looks at 'input_ids' and not at the pixels"):
        purpose.applied(ImageGPTConfig(), tmp_path)
    with pytest.raises(CheckpointError, match="PvtConfig keeps num_labels 1000 whatever.*these are 2"):
        purpose.applied(PvtConfig(), tmp_path)
    distilled = images.KINDS["deit"]()
    distilled.architectures = ["DeiTForImageClassificationWithTeacher"]
    assert purpose.applied(distilled, tmp_path).architectures == distilled.architectures


def test_a_convolutional_model_takes_images_of_every_size(tmp_path: Path) -> None:
    for kind in ("convnext", "resnet"):  # a size in config.json, and none
        assert read_processor(images.checkpoint(tmp_path / kind, kind)).size["height"] == images.SIZE
    with pytest.raises(ValueError, match=r"its convolutions are .*quant.convolutions: true"):
        line.run(load_recipe(recipe(tmp_path, "resnet")))
