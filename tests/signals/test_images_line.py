"""The whole line of tasks of images that learn from a teacher: detectors, classifiers, diffusion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection

from lowbit_ft import pipeline
from lowbit_ft.export.reader import read_weights
from lowbit_ft.integrations.adapter_files import read_adapter
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.images import alike, read_processor
from lowbit_ft.model.linear import PackedLinear, packed_op_only
from lowbit_ft.plan.plan import no_card, plan
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.signals.checkpoint import unlike
from lowbit_ft.stages.teacher import other_checkpoint, pack_other, refuse_other_labels
from lowbit_ft.tasks import labelled
from lowbit_ft.tasks.states import states_of
from tests import detectors, encoders, images
from tests.diffusion import dits

LSQ = {"kind": "tensor", "bits": 8, "dynamic": False, "learn": True, "range": "lsq"}
STATES = {"scores": 0, "outputs": 0}


def recipe(folder: Path, model: Path, task: Any, rows: str, teacher: str, /, **changes: Any) -> Path:
    train = {"teacher": teacher, "max_steps": 2, "micro_batch_size": 4, **changes.pop("train")}
    changes = {"model": {"attention": "eager"}, **changes}
    found = encoders.recipe(folder, model, task, rows, train=train, **changes)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


def dense_of(folder: Path) -> Any:
    return AutoModelForObjectDetection.from_pretrained(folder).eval()


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """RT-DETR, frozen codes, W3A8, that learns from itself at 8 bits: answers, states and labels."""
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("detector")
    model = detectors.detector(folder / "model")
    rows = detectors.write(folder / "rows.jsonl", detectors.rows(12))
    file = recipe(
        folder,
        model,
        "object_detection",
        rows,
        str(model),
        quant={
            "bits": 3,
            "group_size": -1,
            "residual_bits": 0,
            "calibrate": "mse",
            "convolutions": True,
            "activations": LSQ,
        },
        adapter={"method": "scale"},
        data={"train": {"path": rows}, "valid": {"path": rows, "limit": 8}},
        train={
            "signal": {"kind": "layers", "temperature": 2, "losses": {"labels": 0.5, "hidden": 2, **STATES}},
            "max_steps": 4,
            "save_every": 2,
            "learning_rate": 1e-2,
            "scale_learning_rate": 1e-2,
        },
    )
    pipeline.run(load_recipe(file))
    return SimpleNamespace(folder=folder, file=file, run=folder / "run", model=model)


def test_a_detector_learns_from_answers_states_and_labels(ran: SimpleNamespace) -> None:
    found = lines(ran.run)
    for line in found:
        parts = (line["labels_loss"], line["logits_loss"], line["hidden_loss"])
        assert line["loss"] == pytest.approx(0.5 * parts[0] + parts[1] + 2 * parts[2], rel=1e-5)
        assert all(part > 0 for part in parts)
    assert len(found) == 4
    measured = json.loads((ran.run / "teacher.json").read_text())
    assert measured["kl"] < 0.1 * measured["student_kl"] and measured["windows"] == 12
    rows = {r["stage"]: r for r in json.loads((ran.run / "evaluation.json").read_text())["rows"]}
    assert rows["merged"]["loss"] == rows["trained"]["loss"] < rows["quantized"]["loss"]
    assert rows["merged"]["scores"] == rows["trained"]["scores"]


def test_its_codes_are_those_of_the_rounding(ran: SimpleNamespace) -> None:
    before, after = (read_weights(ran.run / name) for name in ("base", "merged"))
    assert before.keys() == after.keys() and len(before) > 50
    assert all(torch.equal(before[n].unpack_codes(), after[n].unpack_codes()) for n in before)
    assert sum(not torch.equal(before[n].scale, after[n].scale) for n in before) > 40


def test_resumed_it_is_the_same(ran: SimpleNamespace, tmp_path: Path) -> None:
    """From the checkpoint of step 2, bit for bit: the noise of RT-DETR's queries too."""
    again = tmp_path / "run"
    shutil.copytree(ran.run, again)
    for name in ("adapter", "merged", "checkpoints/step-00000004"):
        shutil.rmtree(again / name)
    pipeline.train(load_recipe(ran.run / "recipe.yaml", [f"output={again}"]))
    first, second = (read_adapter(folder / "adapter")[1] for folder in (ran.run, again))
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_makes_no_sense_of_a_detector_is_refused(ran: SimpleNamespace, tmp_path: Path) -> None:
    for changes, words in (
        (["train.signal={kind: layers}"], r"losses: got \['scores', 'outputs'\].*only its hidden states"),
        (["train.signal={kind: logits}", "train.teacher=cached"], "set residual, or a model with this head"),
        (["train.teacher=cached"], "set residual, or a model with this head"),
        (
            ["train.signal={kind: layers, losses: {scores: 0, outputs: 0}, intervention: {mode: output}}"],
            "no chain that a teacher could be put into",
        ),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(ran.file, changes)
    asked = load_recipe(ran.file, ["train.signal={kind: logits}"])
    alone = load_recipe(ran.file, ["train.signal={kind: labels}", "train.teacher=null"])
    told, without = (plan(one, card=no_card()) for one in (asked, alone))
    assert told is not None and without is not None and told.parts["teacher"] > 0
    assert 0 < told.trainable < without.trainable, "what only labels reach is left alone"
    assert "teacher" not in without.parts and any("8 bits" in note for note in told.notes)
    convs = [m.weight.nbytes for m in dense_of(ran.model).modules() if isinstance(m, torch.nn.Conv2d)]
    assert told.parts["teacher"] > sum(convs), "which another model keeps dense"
    beside = told.stages["measuring the teacher"] - sum(p.nbytes for p in dense_of(ran.model).parameters())
    assert beside > told.parts["teacher"] and "measuring the teacher" not in without.stages
    layers = plan(load_recipe(ran.file), card=no_card())
    assert layers is not None
    with torch.no_grad():
        made = states_of(
            dense_of(ran.model)(pixel_values=torch.zeros(4, 3, 32, 32), output_hidden_states=True)
        )
    wait = layers.parts["teacher"] - told.parts["teacher"]
    assert wait == 8 * sum(state.numel() for state in made) > 0, "its states, and how far the model's are"

    # a teacher is shown the pictures that the model's processor makes
    other = shutil.copytree(ran.model, tmp_path / "other")
    assert unlike(other, ran.model, "images") is None
    processor = other / "preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"rescale_factor": 0.01}))
    assert "makes other numbers of a picture" in str(unlike(other, ran.model, "images"))
    assert not alike(read_processor(other), read_processor(ran.model))
    with pytest.raises(RecipeError, match="makes other numbers of a picture"):
        load_recipe(ran.file, [f"train.teacher={other}"])


def test_queries_that_are_learned_from_the_base_before_rounding(tmp_path: Path) -> None:
    """DETR, whose classes are a softmax, by its residual, its convolutions too."""
    model = detectors.detector(tmp_path / "model", "detr")
    rows = detectors.write(tmp_path / "rows.jsonl", detectors.rows(8))
    file = recipe(
        tmp_path,
        model,
        "object_detection",
        rows,
        "residual",
        quant={"bits": 3, "group_size": -1, "residual_bits": 4, "calibrate": "mse", "convolutions": True},
        train={"signal": {"kind": "mix"}, "max_steps": 1},
        eval={"perplexity": False},
    )
    pipeline.run(load_recipe(file))
    (first,) = lines(tmp_path / "run")
    want = (first["labels_loss"] + first["logits_loss"]) / 2
    assert first["loss"] == pytest.approx(want, rel=1e-5) and first["logits_loss"] > 0
    measured = json.loads((tmp_path / "run" / "teacher.json").read_text())
    assert 0 < 4 * measured["kl"] < measured["student_kl"]


def test_a_classifier_learns_from_its_own_residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT, its hidden states too, its layers run again; the teacher is measured on rows that were read."""
    reads, read = list[Any](), labelled.read_encoded
    monkeypatch.setattr(labelled, "read_encoded", lambda *given: reads.append(given) or read(*given))
    model = images.vit(tmp_path / "model", head=True)
    rows = images.parquet(tmp_path / "rows.parquet", images.rows(12))
    file = recipe(
        tmp_path,
        model,
        {"kind": "image_classification", "labels": list(images.LABELS)},
        rows,
        "residual",
        quant={"bits": 3, "group_size": 32, "residual_bits": 4, "calibrate": "mse"},
        train={"signal": {"kind": "layers", "losses": STATES}, "gradient_checkpointing": True},
    )
    pipeline.run(load_recipe(file))
    first = lines(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(first["logits_loss"] + first["hidden_loss"], rel=1e-5)
    assert first["hidden_loss"] > 0 and "labels_loss" not in first
    assert len(reads) == 2, "to train, and for the table"


def test_a_teacher_of_other_labels_is_refused(tmp_path: Path) -> None:
    """Its head has the same shape: before the base is packed, or it would teach one label by another's name.
    Names that are others are said."""
    rows = images.parquet(tmp_path / "rows.parquet", images.rows(4))
    task = {"kind": "image_classification", "labels": list(images.LABELS)}
    for teacher, label in ((str(tmp_path / "model"), "model"), ("residual", "residual")):
        model = images.vit(tmp_path / "model", head=True)
        config = json.loads((model / "config.json").read_text())
        said = list[str]()
        for names, told in (
            (images.LABELS, []),
            (("flat", "tall"), ["label 0 is 'flat' there and 'across' here"]),
        ):
            config["id2label"] = dict(enumerate(names))
            (model / "config.json").write_text(json.dumps(config))
            checkpoint = Checkpoint.open(model, None, "float32")
            session: Any = SimpleNamespace(
                recipe=SimpleNamespace(task=SimpleNamespace(labels=images.LABELS)), say=said.append
            )
            refuse_other_labels(session, teacher, checkpoint)
            assert len(said) == len(told) and all(a in b for a, b in zip(told, said, strict=True))
        config["id2label"] = dict(enumerate(reversed(images.LABELS)))
        (model / "config.json").write_text(json.dumps(config))
        file = recipe(
            tmp_path,
            model,
            task,
            rows,
            teacher,
            quant={"bits": 3, "group_size": 32, "residual_bits": 4, "calibrate": "mse"},
            train={"signal": {"kind": "logits"}},
        )
        with pytest.raises(
            ValueError, match=f"got '.*{label}', for which 'across' is label 1, and here it is 0"
        ):
            pipeline.train(load_recipe(file))
        assert not (tmp_path / "run" / "base").exists()


def test_a_network_of_convolutions_teaches_in_8_bits(tmp_path: Path) -> None:
    """It has no linear but its head: it was refused, for want of a layer, when the base was packed."""
    model = images.checkpoint(tmp_path / "model", "resnet", head=True)
    rows = images.parquet(tmp_path / "rows.parquet", images.rows(4))
    file = recipe(
        tmp_path,
        model,
        {"kind": "image_classification", "labels": list(images.LABELS)},
        rows,
        str(model),
        quant={"bits": 4, "group_size": -1, "residual_bits": 0, "calibrate": "mse", "convolutions": True},
        adapter={"method": "scale"},
        train={"signal": {"kind": "logits"}},
    )
    made = load_recipe(file)
    session: Any = SimpleNamespace(
        recipe=made,
        checkpoint=Checkpoint.open(model, None, "float32", purpose=made.task.purpose(0)),
        device=torch.device("cpu"),
        dtype=torch.float32,
        say=lambda text: None,
    )
    teacher, _ = pack_other(session, str(model))
    packed = [layer for layer in teacher.modules() if isinstance(layer, PackedLinear)]
    assert len(packed) > 3 and all(layer.grid.bits == 8 for layer in packed)
    shown = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad(), packed_op_only(teacher):
        said = teacher(pixel_values=shown).logits
        wanted = AutoModelForImageClassification.from_pretrained(model).eval()(pixel_values=shown).logits
    torch.testing.assert_close(said, wanted, rtol=0.05, atol=0.05)


def test_a_diffusion_transformer_learns_what_its_teacher_says(tmp_path: Path) -> None:
    """The velocity, by its squared error, beside that from the rows' own."""
    pytest.importorskip("diffusers")
    model = dits.write(tmp_path / "model", num_layers=1)
    file = recipe(
        tmp_path,
        model,
        {"kind": "image_generation", "samples": 0},
        str(dits.rows(tmp_path / "rows", 12)),
        str(model),
        model={},
        train={"signal": {"kind": "mix", "label_weight": 0.25}, "micro_batch_size": 12},
    )
    pipeline.run(load_recipe(file))
    first = lines(tmp_path / "run")[0]
    want = 0.25 * first["labels_loss"] + 0.75 * first["logits_loss"]
    assert first["loss"] == pytest.approx(want, rel=1e-5) and first["logits_loss"] > 0
    with pytest.raises(
        RecipeError, match="temperature: got 2.0.*of which the squared error is taken; set 1.0"
    ):
        load_recipe(file, ["train.signal={kind: logits, temperature: 2}"])


def test_a_diffusion_transformer_that_says_something_else_is_no_teacher(tmp_path: Path) -> None:
    """Of the same shapes: noise would be taken for the velocity."""
    pytest.importorskip("diffusers")
    model, other = (dits.write(tmp_path / name, num_layers=1) for name in ("model", "other"))
    config = json.loads((other / "config.json").read_text())
    file = recipe(
        tmp_path,
        model,
        {"kind": "image_generation", "samples": 0},
        str(dits.rows(tmp_path / "rows", 4)),
        str(other),
        model={},
        train={"signal": {"kind": "logits"}},
    )
    made = load_recipe(file)
    session: Any = SimpleNamespace(recipe=made, checkpoint=Checkpoint.open(model, None, "float32"))
    assert other_checkpoint(session, str(other)).folder == other
    (other / "config.json").write_text(json.dumps(config | {"prediction": "noise"}))
    with pytest.raises(
        ValueError, match="train.teacher: got .*trained to say 'noise'.*or give another teacher"
    ):
        other_checkpoint(session, str(other))
