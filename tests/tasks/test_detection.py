"""The whole line for detectors: boxes in, integers out; batch norms, other classes, and readers we did not
write."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForObjectDetection, pipeline

from lowbit_ft import pipeline as line
from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.data.errors import DataError
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.merge import base_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.conv import PackedConv2d
from lowbit_ft.model.images import made_size, picture_of, read_processor, size_of
from lowbit_ft.model.load import load_model
from lowbit_ft.model.purpose import Purpose, head_parameters, head_parts
from lowbit_ft.plan.plan import no_card, plan
from lowbit_ft.plan.step import WHOLE
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.base import Feed
from lowbit_ft.tasks.object_detection import as_tensors, detected
from tests import detectors, encoders

pytest.importorskip("pycocotools")
EAGER = {"attention": "eager"}  # transformers' backbones have no other
LSQ = {"kind": "tensor", "bits": 8, "dynamic": False, "learn": True, "range": "lsq"}


def recipe(folder: Path, kind: str = "rt_detr", **changes: Any) -> Path:
    model = detectors.detector(folder / "model", kind)
    train = detectors.write(folder / "train.jsonl", detectors.rows(16))
    valid = detectors.write(folder / "valid.jsonl", detectors.rows(8, seed=1))
    data = {"train": {"path": train}, "valid": {"path": valid}}
    changes = {"model": EAGER, "data": data, **changes}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(encoders.recipe(folder, model, "object_detection", train, **changes)))
    return file


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """RT-DETR, W4 with its convolutions, inputs of 8 bits whose scales are LSQ's."""
    folder = tmp_path_factory.mktemp("rt_detr")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("lowbit_ft.session.Session.say", lambda _, text: said.append(str(text)))
        file = recipe(
            folder,
            quant={"convolutions": True, "group_size": -1, "activations": LSQ},
            train={"max_steps": 4, "save_every": 2, "learning_rate": 2e-2, "scale_learning_rate": 1e-2},
        )
        line.run(load_recipe(file))
    rows = json.loads((folder / "run" / "evaluation.json").read_text())["rows"]
    return SimpleNamespace(
        folder=folder, run=folder / "run", said="\n".join(said), rows={row["stage"]: row for row in rows}
    )


def test_what_is_trained_is_what_ships(ran: SimpleNamespace) -> None:
    assert list(ran.rows) == ["base", "quantized", "trained", "merged"]
    assert ran.rows["merged"]["loss"] == ran.rows["trained"]["loss"] < ran.rows["quantized"]["loss"]
    assert set(ran.rows["merged"]["scores"]) == {"map", "map50", "map75"}
    assert ran.rows["merged"]["scores"] == ran.rows["trained"]["scores"]
    last = json.loads((ran.run / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["images"] == 4 * 8 and last["images_per_s"] > 0 and "tokens" not in last
    assert "images per second, median" in (ran.run / "report.html").read_text()
    assert "16 of 16 rows used\n" in ran.said and "8 images" in ran.said
    config = json.loads((ran.run / "merged" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(detectors.LABELS)


def test_a_stopped_run_goes_on_to_the_same_bytes(ran: SimpleNamespace) -> None:
    """With the noise that the model draws for its copies of the boxes, which the loss is of too."""
    written = {p: p.read_bytes() for p in (ran.run / "merged").glob("*.safetensors")}
    first, *others = sorted((ran.run / "checkpoints").iterdir())
    assert written and others and not first.name.endswith("4")
    for folder in (*others, ran.run / "adapter", ran.run / "merged"):
        shutil.rmtree(folder)
    line.train(load_recipe(ran.folder / "recipe.yaml"))
    assert {p: p.read_bytes() for p in written} == written


def test_its_convolutions_are_packed_and_its_head_is_not(ran: SimpleNamespace) -> None:
    read = load_exported(ran.run / "merged", dtype=torch.float32, attention="eager")
    layers: dict[str, Any] = dict(packed_layers(read))
    convs = [name for name, layer in layers.items() if isinstance(layer, PackedConv2d)]
    assert len(convs) == 31 and len(layers) == 31 + 29 and "decoder.layers.1.mlp.fc1" in " ".join(layers)
    base = load_exported(ran.run / "base", dtype=torch.float32, attention="eager")
    before = dict(packed_layers(base))
    moved = [n for n in layers if not torch.equal(layers[n].base.scale, before[n].base.scale)]
    assert len(moved) > 50, "scales have trained (not those of the offsets, which are all 0 in a new model)"
    heads = tuple(f"{name}." for name in head_parts(read))
    assert any("class_embed" in name for name in heads) and any("enc_score" in name for name in heads)
    assert not any(f"{name}.".startswith(heads) for name in layers)
    schemes = {layer.activation.scheme().kind for layer in layers.values() if layer.activation is not None}
    assert schemes == {"tensor"} and all(layer.activation is not None for layer in layers.values())


def test_batch_norms_keep_the_statistics_of_the_checkpoint(ran: SimpleNamespace) -> None:
    """In training too: what ships has those that came, and trained with them."""
    came, merged = (load_file(ran.folder / f / "model.safetensors") for f in ("model", "run/merged"))
    running = [name for name in came if "running_" in name]
    assert len(running) == 2 * 31 and all(came[name].std() > 0 for name in running)
    assert all(torch.equal(came[name], merged[name]) for name in running)
    read: Any = load_exported(ran.run / "base", dtype=torch.float32, attention="eager").train()
    norms = [m for m in read.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 31 and not any(norm.training for norm in norms)
    before = {n: b.clone() for n, b in read.named_buffers() if "running" in n}
    read(pixel_values=torch.rand(2, 3, 32, 32))
    assert all(torch.equal(b, before[n]) for n, b in read.named_buffers() if n in before)


def test_transformers_pipeline_finds_the_same_boxes(ran: SimpleNamespace) -> None:
    pictures = [picture_of(row["image"]) for row in detectors.rows(3, seed=5)]
    said = pipeline("object-detection", str(ran.run / "merged"))(pictures, threshold=0.0)
    assert len(said) == 3 and {one["label"] for row in said for one in row} <= set(detectors.LABELS)
    processor = read_processor(ran.run / "merged")
    batch = processor(pictures, return_tensors="pt")
    merged = AutoModelForObjectDetection.from_pretrained(
        ran.run / "merged", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        wanted = merged(**batch)
    ours = detected(processor, wanted, [p.size for p in pictures], 0.0)
    for mine, theirs in zip(ours, said, strict=True):
        boxes = [dict(zip(("xmin", "ymin", "xmax", "ymax"), map(int, b), strict=True)) for b in mine.boxes]
        assert boxes == [one["box"] for one in theirs]
        assert mine.scores.tolist() == pytest.approx([one["score"] for one in theirs], abs=1e-6)


def test_onnx_runtime_finds_the_same_boxes(tmp_path: Path) -> None:
    """Of DETR, whose queries are no choice of the best: with random weights those are ties. The quickstart
    holds RT-DETR's graph to it."""
    exporter = EXPORTERS["onnx"]
    for modules in (exporter.writes_with, exporter.reads_with):
        if reason := exporter.missing(modules):
            pytest.skip(f"onnx {reason}")
    folder = detectors.detector(tmp_path / "model", "detr")
    purpose = Purpose("AutoModelForObjectDetection", {})
    checkpoint = Checkpoint.open(folder, dtype="float32", purpose=purpose)
    keys = {"bits": 4, "group_size": -1, "residual_bits": 0, "calibrate": "absmax"}
    model, _ = quantize(checkpoint, QuantSection.model_validate(keys), dtype=torch.float32, attention="eager")
    write_model(tmp_path / "onnx", checkpoint, base_weights(model), exporter)
    graph: Any = load_exported(tmp_path / "onnx", dtype=torch.float32)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found, wanted = graph(pixel_values=images), model.eval()(pixel_values=images)
    assert set(vars(found)) == {"logits", "pred_boxes"} and graph.inputs["pixel_values"] == [1, 3, 32, 32]
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine", "detr", "yolos"])
def test_the_loss_is_the_models_own(kind: str, tmp_path: Path) -> None:
    """Sum and count; a mean over the boxes of several batches, of which one has none; and of images, for
    those that are made (its gradient reaches them)."""
    folder = detectors.detector(tmp_path / "model", kind)
    task: Any = TASKS["object_detection"].model_validate(
        {"kind": "object_detection", "labels": detectors.LABELS}
    )
    path = detectors.write(tmp_path / "rows.jsonl", detectors.rows(5))
    source = SimpleNamespace(path=path, split="train", name=None, revision=None, limit=None)
    processor = read_processor(folder)
    examples = task.examples(source, SimpleNamespace(sequence_len=16, on_bad_row="error"), processor)
    model = AutoModelForObjectDetection.from_pretrained(folder, attn_implementation="eager").eval()
    feed = Feed(SimpleNamespace(train=SimpleNamespace(seed=0)), processor)
    batches = list(task.batches(feed, model, examples, 2, shuffle=False).one_epoch())
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    counts = [int(task.count(batch)) for batch in batches]
    assert counts[2] == 1 and not len(batches[2]["labels"][0]["boxes"]), "no box: one is counted"
    for batch, count in zip(batches, counts, strict=True):
        labels = {"labels": batch["labels"]}
        ours = task.loss(task.outputs(model, {"pixel_values": batch["pixel_values"]}, labels), labels)
        torch.testing.assert_close(ours / count, model(**batch).loss)
    images = batches[0]["pixel_values"].clone().requires_grad_()
    made = [(one["class_labels"].tolist(), one["boxes"].tolist()) for one in batches[0]["labels"]]
    whole = task.labeller(processor).loss(model, images, made)
    torch.testing.assert_close(whole, model(**batches[0]).loss)
    whole.backward()
    assert images.grad is not None and float(images.grad.abs().max()) > 0
    empty = as_tensors({"class_labels": [], "boxes": []})
    assert empty["boxes"].shape == (0, 4) and empty["class_labels"].dtype == torch.int64


@pytest.mark.parametrize("kind", ["detr", "yolos"])
def test_a_process_counts_its_own_boxes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among several processes DETR's loss asks all of them, and one that evaluates alone would wait."""
    from accelerate import PartialState
    from transformers.loss import loss_for_object_detection as theirs

    folder = detectors.detector(tmp_path / "model", kind)
    model = AutoModelForObjectDetection.from_pretrained(folder, attn_implementation="eager").eval()
    labels = [as_tensors({"class_labels": [0], "boxes": [[0.5, 0.5, 0.4, 0.4]]})]
    images = torch.zeros(1, 3, *(made_size(folder) or ()))
    alone = model(pixel_values=images, labels=labels).loss

    def reduce(*_: Any) -> Any:
        raise AssertionError("other processes are asked")

    monkeypatch.setattr(PartialState, "_shared_state", {"num_processes": 2})
    monkeypatch.setattr(theirs, "reduce", reduce)
    with pytest.raises(AssertionError, match="are asked"):
        model(pixel_values=images, labels=labels)
    task: Any = TASKS["object_detection"].model_validate({"kind": "object_detection"})
    assert torch.equal(task.outputs(model, {"pixel_values": images}, {"labels": labels}).loss, alone)
    answer = ((0,), ((0.5, 0.5, 0.4, 0.4),))
    assert torch.equal(task.labeller(None).loss(model, images, [answer]), alone)
    assert PartialState._shared_state == {"num_processes": 2}


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine", "detr", "yolos"])
def test_other_classes_are_a_new_head(kind: str, tmp_path: Path) -> None:
    """What says classes is drawn as transformers draws it, the same from the same seed; all else stays."""
    folder = detectors.detector(tmp_path / "model", kind)
    values = detectors.names(("cat", "dog"))
    purpose = Purpose("AutoModelForObjectDetection", values, 3, relabels=True, whole=True)
    made, again = (
        load_model(Checkpoint.open(folder, dtype="float32", purpose=purpose), "eager") for _ in range(2)
    )
    came = AutoModelForObjectDetection.from_pretrained(folder)
    old, new = came.state_dict(), made.state_dict()
    other = [name for name in new if new[name].shape != old[name].shape]
    assert other and all(any(word in name for word in ("class", "score")) for name in other)
    for name, value in new.items():
        assert torch.equal(value, again.state_dict()[name])
        assert name in other or torch.equal(value, old[name]), name
    if kind == "rt_detr":  # classes begin rare: 1 in 3 of them
        torch.testing.assert_close(new["model.enc_score_head.bias"].sigmoid(), torch.full((2,), 1 / 3))
    strict = Purpose("AutoModelForObjectDetection", values, 3)
    with pytest.raises((CheckpointError, ValueError)):
        load_model(Checkpoint.open(folder, dtype="float32", purpose=strict), "eager")


@pytest.mark.parametrize("kind", ["LwDetr", "RfDetr", "RTDetrV2", "Deimv2"])
def test_the_head_is_all_that_goes_by_the_labels(kind: str) -> None:
    """By the shapes of models of 3 and of 5 labels, without data: what is no part of the head would be
    packed, and not fit the files where the labels are others."""
    import transformers

    model, config = (getattr(transformers, f"{kind}{of}") for of in ("ForObjectDetection", "Config"))
    few, more = (detectors.names(tuple("abcde"[:count])) for count in (3, 5))
    with torch.device("meta"):
        built = [model(config(**names)) for names in (few, more)]
    ours, theirs = (dict(model.named_parameters()) for model in built)
    other = {name for name, value in ours.items() if value.shape != theirs[name].shape}
    assert other and other <= head_parameters(built[0]).keys()


def test_a_model_without_a_loss_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.PPOCRV5MobileDetConfig()
    with pytest.raises(CheckpointError, match="PPOCRV5MobileDetForObjectDetection takes no labels"):
        Purpose("AutoModelForObjectDetection", {}).applied(config, tmp_path)


def test_pictures_of_one_size(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    model = tmp_path / "model"
    assert made_size(model) == (32, 32) and made_size(tmp_path) is None
    found = load_recipe(file)
    config = json.loads((model / "config.json").read_text())
    settled: Any = found.task.settled(found, config)
    assert settled.image_size == (32, 32) and settled.labels == detectors.LABELS
    wrong = load_recipe(file, ["task={kind: object_detection, image_size: [64, 64]}"])
    with pytest.raises(DataError, match=r"image_size: got \[64, 64\].*makes \[32, 32\]"):
        wrong.task.settled(wrong, config)
    with pytest.raises(RecipeError, match="quant.calibrate: got 'gptq'.*which this model is not; set mse"):
        load_recipe(file, ["quant.calibrate=gptq"])
    with pytest.raises(RecipeError, match="model.dtype: got 'bfloat16'.*its loss needs more digits"):
        load_recipe(file, ["model.dtype=bfloat16"])
    assert load_recipe(file, ["quant.bits=2", "quant.calibrate=auto"]).quant.calibrate == "mse"
    processor = model / "preprocessor_config.json"
    told = json.loads(processor.read_text()) | {"size": {"shortest_edge": 32, "longest_edge": 64}}
    processor.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"makes images of \[3, 32, 32\] and \[3, 32, 64\]"):
        read_processor(model)


def test_the_size_of_a_turned_picture() -> None:
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 16)).save(file, "JPEG", exif=exif)
    assert size_of(file.getvalue()) == (16, 8) == picture_of(file.getvalue()).size


def test_the_plan_counts_the_whole_network(tmp_path: Path) -> None:
    """Its layers are no chain; of four times the pictures a step holds more than twice as much."""
    file = recipe(tmp_path)
    small, large = (
        plan(load_recipe(file, [f"train.micro_batch_size={count}"]), card=no_card()) for count in (2, 8)
    )
    assert small is not None and large is not None and small.notes == large.notes == [WHOLE]
    assert small.trainable == large.trainable > 0
    parts = ("one layer", "saved layer inputs")
    works = [sum(made.parts[name] for name in parts) for made in (small, large)]
    assert works[1] > 2 * works[0] > 0
    ends = [made.stages["evaluation at the end"] for made in (small, large)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3), "as many pictures at a time, whatever trains"
    image = torch.rand(1, 3, 32, 32)  # tables of the plan's tensors are nowhere in transformers' caches
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert bool(model.eval()(pixel_values=image).pred_boxes.isfinite().all())


def test_the_report_draws_the_boxes(ran: SimpleNamespace) -> None:
    facts = json.loads((ran.run / "boxes.json").read_text())
    assert facts["names"] == list(detectors.LABELS) and len(facts["pictures"]) == 6
    first = facts["pictures"][0]
    assert set(first["boxes"]) == {"true", "base", "quantized", "trained", "merged"}
    assert first["size"] == [48, 40]
    wanted = detectors.rows(8, seed=1)[0]["objects"]["bbox"][0]
    x, y, wide, high = wanted
    assert first["boxes"]["true"][0][:4] == pytest.approx([x, y, x + wide, y + high], abs=1e-3)
    page = (ran.run / "report.html").read_text()
    assert "Boxes that were found" in page and "boxes that are right" in page
