"""The whole line for a ViT: pictures in, integers out, and what stays dense said."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from lowbit_ft import pipeline as line
from lowbit_ft.data.errors import DataError
from lowbit_ft.data.form import Form, form_of
from lowbit_ft.export.reader import load_exported
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.images import patches, picture_of, pixels, problem_of, read_processor
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.data import DataSource
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.stages.outside import export_outside
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.kept import data_of
from lowbit_ft.tasks.labels import found_labels
from tests import encoders, images

PROJECTION = "vit.embeddings.patch_embeddings.projection.weight"


def recipe(folder: Path, count: int = 96, **changes: Any) -> Path:
    train = str(images.folder_of(folder / "pictures", images.rows(count), "train"))
    valid = images.parquet(folder / "valid.parquet", images.rows(count // 3, seed=1))
    data = {"train": {"path": train}, "valid": {"path": valid}, "sequence_len": 17}
    found = encoders.recipe(
        folder, images.vit(folder / "model"), "image_classification", train, data=data, **changes
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """W4 with inputs of 8 bits; pictures of a folder are learned, those of a parquet file are measured."""
    folder = tmp_path_factory.mktemp("vit")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("lowbit_ft.session.Session.say", lambda _, text: said.append(str(text)))
        line.run(
            load_recipe(
                recipe(
                    folder,
                    quant={"calibrate": "gptq", "activations": {"kind": "token", "bits": 8}},
                    adapter={"method": "full_qat"},
                    train={"max_steps": 45, "micro_batch_size": 16, "learning_rate": 5e-2}
                    | {"modules_learning_rate": 2e-2},
                )
            )
        )
    rows = json.loads((folder / "run" / "evaluation.json").read_text())["rows"]
    return SimpleNamespace(
        folder=folder, run=folder / "run", said="\n".join(said), rows={row["stage"]: row for row in rows}
    )


def test_it_learns_and_what_is_trained_is_what_ships(ran: SimpleNamespace) -> None:
    assert list(ran.rows) == ["base", "quantized", "trained", "merged"]
    scores = {stage: row["scores"] for stage, row in ran.rows.items()}
    assert scores["trained"]["accuracy"] > 0.85 > scores["quantized"]["accuracy"]
    assert ran.rows["merged"]["loss"] == ran.rows["trained"]["loss"]
    assert scores["merged"] == scores["trained"]
    assert "96 of 96 rows used\n" in ran.said and "answers: " in ran.said and "32 images" in ran.said


def test_the_convolution_stays_as_it_came_and_is_said(ran: SimpleNamespace) -> None:
    table = json.loads((ran.run / "quant.json").read_text())
    assert sum(row["action"] == "quantized" for row in table) == 12
    reasons = {row["layer"]: row["reason"] for row in table if row["action"] != "quantized"}
    assert reasons[PROJECTION] == "Conv2d: no linear layer, stays in float32"
    merged, came = (load_file(ran.folder / f / "model.safetensors") for f in ("run/merged", "model"))
    own = PROJECTION.removeprefix("vit.")  # as the checkpoint of a body calls it
    assert torch.equal(merged[own], came[own])
    assert f"stayed dense, as they came: {PROJECTION}" in (ran.run / "merged" / "README.md").read_text()
    assert "Conv2d: no linear layer" in (ran.run / "report.html").read_text()


def test_readers_we_did_not_write(ran: SimpleNamespace, tmp_path: Path) -> None:
    """Transformers' pipeline on merged/, ONNX Runtime on the graph: the same labels, and logits."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_outside(ran.run / "merged", "onnx", tmp_path / "graph")
    found = images.rows(12, seed=3)
    pictures = [picture_of(row["image"]) for row in found]
    said = pipeline("image-classification", str(ran.run / "merged"))(pictures)
    assert sum(one[0]["label"] == row["label"] for one, row in zip(said, found, strict=True)) >= 10
    merged = AutoModelForImageClassification.from_pretrained(ran.run / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(ran.run / "merged", backend="pil")
    batch = processor(pictures, return_tensors="pt")
    torch.testing.assert_close(
        batch["pixel_values"], torch.stack([pixels(read_processor(ran.run / "merged"), x) for x in pictures])
    )
    with torch.no_grad():
        logits = load_exported(tmp_path / "graph", dtype=torch.float32)(**batch).logits
        # inputs of 8 bits may round to the other side of a tie
        torch.testing.assert_close(logits, merged(**batch).logits, rtol=1e-2, atol=1e-2)
    card = (ran.run / "merged" / "README.md").read_text()
    assert "AutoImageProcessor" in card and "AutoTokenizer" not in card and "IMAGE.png" in card


def file_of(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_a_picture_that_is_cut_off_is_none(kind: str) -> None:
    """Its header is whole, and so a reader opens it."""
    whole = file_of(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    assert problem_of(whole) is None and problem_of(whole[: len(whole) // 2])


def test_a_picture_of_more_than_8_bits_is_refused() -> None:
    """As RGB nearly all of it would be white, and of floats black."""
    for picture, kind in ((Image.new("I;16", (4, 4), 4000), "PNG"), (Image.new("F", (4, 4), 0.5), "TIFF")):
        assert "more than 8 bits a channel" in str(problem_of(file_of(picture, kind)))


def test_rows_that_are_no_pictures(tmp_path: Path) -> None:
    task = TASKS["image_classification"].model_validate(
        {"kind": "image_classification", "labels": images.LABELS}
    )
    section = SimpleNamespace(sequence_len=17, on_bad_row="error")
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    for value, said in (
        (str(tmp_path / "text.png"), "'image' is no picture that Pillow reads"),
        (str(tmp_path / "none.png"), "none.png cannot be read: No such file"),
        (3, "'image' must be a picture, as datasets keeps it, or the path of one; got a number"),
        (str(tmp_path / "pipe.png"), "pipe.png cannot be read: .*got a pipe"),
        ("~nobody-is-called-so/a.png", "cannot be read: Could not determine home directory"),
        ("a\0b.png", "cannot be read: embedded null byte"),
    ):
        path = encoders.write(tmp_path / "rows.jsonl", [{"image": value, "label": "across"}])
        source = SimpleNamespace(path=path, format=None, split="train", name=None, revision=None, limit=None)
        with pytest.raises(DataError, match=said):
            task.examples(source, section, None)


def test_a_plan_counts_the_pictures_of_a_folder(tmp_path: Path) -> None:
    folder = images.folder_of(tmp_path / "pictures", images.rows(7), "train")
    source = SimpleNamespace(
        path=str(folder), format=None, split="train", name=None, revision=None, limit=None
    )
    assert form_of(source, "error") == Form(rows=7)


def test_a_network_that_takes_images_of_every_size(tmp_path: Path) -> None:
    """A ResNet's config.json names none."""
    folder = images.vit(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "resnet", "num_channels": 3}')
    assert read_processor(folder)(Image.new("RGB", (9, 5)))["pixel_values"][0].shape == (3, 32, 32)
    (folder / "config.json").write_text('{"model_type": "resnet", "num_channels": 1}')
    with pytest.raises(CheckpointError, match=r"makes images of \[3, 32, 32\].*takes \[1, 32, 32\]"):
        read_processor(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ConvNextImageProcessor", "do_resize": false}'
    )
    with pytest.raises(CheckpointError, match="of pictures of two shapes, and a batch has one"):
        read_processor(folder)


def test_a_size_that_no_memory_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a picture is made of it."""
    folder = images.vit(tmp_path / "model")
    config = folder / "preprocessor_config.json"
    config.write_text(config.read_text().replace("32", "1000000"))
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("a picture is made"))
    with pytest.raises(CheckpointError, match="size: height is 1000000; allowed: up to 8,192 pixels"):
        read_processor(folder)


def test_a_folder_that_does_not_fit_is_named(tmp_path: Path) -> None:
    file = recipe(tmp_path, 6, model={"add_tokens": ["<x>"]})
    with pytest.raises(RecipeError, match="model.add_tokens.*it reads no tokens; set null"):
        load_recipe(file)
    config = tmp_path / "model" / "preprocessor_config.json"
    config.write_text(config.read_text().replace("32", "16"))
    with pytest.raises(CheckpointError, match=r"makes images of \[3, 16, 16\].*takes \[3, 32, 32\]"):
        read_processor(tmp_path / "model")
    config.unlink()
    with pytest.raises(RecipeError, match="image processor cannot be loaded.*preprocessor_config.json"):
        load_recipe(file)
    assert patches({"image_size": 32, "patch_size": [8, 8]}) == 17 and patches({"vocab_size": 3}) is None
    for wrong in (0, -8, "8", [8], [8, "8"], [8, 0], True):
        assert patches({"image_size": 32, "patch_size": wrong}) is None


def test_a_picture_is_shown_the_right_way_up() -> None:
    """A turned JPEG says so in its EXIF data."""
    upright = Image.new("RGB", (8, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = io.BytesIO()
    upright.save(file, "JPEG", exif=exif)
    assert picture_of(file.getvalue()).size == (16, 8)


def test_a_row_names_its_picture_from_the_folder_of_its_own_file(tmp_path: Path, monkeypatch: Any) -> None:
    """Two sources with files of one name; what lies in the current folder is taken where there is none."""
    sources = []
    for color in ("red", "blue"):
        folder = tmp_path / color
        folder.mkdir()
        Image.new("RGB", (8, 8), color).save(folder / "x.png")
        rows = [{"image": "x.png", "label": "across"}, {"image": "here.png", "label": "upright"}]
        encoders.write(folder / "rows.jsonl", rows)
        sources.append(DataSource(path=str(folder / "rows.jsonl")))
    Image.new("RGB", (8, 8), "lime").save(tmp_path / "here.png")
    monkeypatch.chdir(tmp_path)
    task = TASKS["image_classification"].model_validate(
        {"kind": "image_classification", "labels": images.LABELS}
    )
    found = task.examples(sources, SimpleNamespace(sequence_len=17, on_bad_row="error"), None)
    middles = [picture_of(data_of(row["image"])).getpixel((4, 4)) for row in found]
    assert middles == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 0)]


def test_pictures_that_are_files_are_read_when_a_batch_shows_them(tmp_path: Path) -> None:
    """Not held: all of COCO is 18 GB. The run is the same as of rows that have the bytes, with which it was
    begun perhaps; a file that was changed meanwhile is named."""
    given = sorted(images.rows(9, seed=2), key=lambda row: row["label"])
    for number, row in enumerate(given):
        file = tmp_path / "folder" / row["label"] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"])
    task = TASKS["image_classification"].model_validate(
        {"kind": "image_classification", "labels": images.LABELS}
    )
    processor = read_processor(images.vit(tmp_path / "model"))
    section = SimpleNamespace(sequence_len=17, on_bad_row="error")
    feed: Any = SimpleNamespace(
        r=SimpleNamespace(train=SimpleNamespace(seed=0)), tokenizer=processor, rank=0, world=1
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    paths = [
        str(tmp_path / "folder"),
        images.parquet(tmp_path / "rows.parquet", given),
        str(tmp_path / "saved"),
    ]
    datasets.Dataset.from_parquet(paths[1], cache_dir=str(tmp_path / "cache")).save_to_disk(paths[2])
    files, held, table = (task.examples(DataSource(path=path), section, processor) for path in paths)
    assert files.digest == held.digest == table.digest and len(files) == 9
    assert not any(isinstance(value, bytes) for row in (*files, *table) for value in row.values())
    one, other, third = (task.batches(feed, model, rows, 4, shuffle=True) for rows in (files, held, table))
    for _ in range(3):
        a, *more = next(one), next(other), next(third)
        for b in more:
            assert torch.equal(a["labels"], b["labels"]) and torch.equal(a["pixel_values"], b["pixel_values"])
    for file in (tmp_path / "folder").rglob("*.png"):
        file.write_bytes(given[0]["image"])
    with pytest.raises(DataError, match=r"\.png: was changed while the run reads it"):
        for _ in range(3):
            next(one)


def test_numbers_have_the_names_that_the_data_set_says(tmp_path: Path) -> None:
    """ClassLabel of `datasets`, also inside of objects: of a checkpoint that knows more labels, the first of
    those would be shipped as the names of others."""
    kind = datasets.ClassLabel(names=["rust", "healthy"])
    columns = {
        "label": kind,
        "objects": {"category": datasets.List(kind)},
        "several": datasets.List({"category": kind}),
        "plain": datasets.Value("int64"),
    }
    values = {
        "label": [0, 1],
        "objects": [{"category": [1]}, {"category": []}],
        "several": [[{"category": 0}], []],
        "plain": [1, 0],
    }
    table = datasets.Dataset.from_dict(values, datasets.Features(columns))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    config = {"id2label": {"0": "person", "1": "bicycle", "2": "car"}}
    for name in ("rows.parquet", "saved"):
        source = DataSource(path=str(tmp_path / name))
        for column, within in (("label", None), ("category", "objects"), ("category", "several")):
            assert found_labels(source, column, config, within) == ["rust", "healthy"], (name, within)
        assert found_labels(source, "plain", config) == ["person", "bicycle", "car"]
        same, turned = (
            {"id2label": {"0": "RUST", "1": "Healthy"}},
            {"id2label": {"0": "healthy", "1": "rust"}},
        )
        assert found_labels(source, "label", same) == ["RUST", "Healthy"]
        with pytest.raises(DataError, match="stand for rust, healthy, and config.json .* as healthy, rust"):
            found_labels(source, "label", turned)
    other = datasets.Features({"label": datasets.ClassLabel(names=["healthy", "rust"])})
    datasets.Dataset.from_dict({"label": [0]}, other).to_parquet(str(tmp_path / "other.parquet"))
    both = [DataSource(path=str(tmp_path / name)) for name in ("rows.parquet", "other.parquet")]
    with pytest.raises(DataError, match="numbers stand for healthy, rust here and for rust, healthy"):
        found_labels(both, "label", config)
