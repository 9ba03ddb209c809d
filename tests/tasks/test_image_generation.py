"""task: image_generation: rows, batches and loss; a short run of the line; every integer method on it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from typer.testing import CliRunner

from lowbit_ft import pipeline
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.cli.main import app
from lowbit_ft.data.errors import DataError
from lowbit_ft.diffusion.paths import PATHS
from lowbit_ft.diffusion.pictures import Pictures
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.merge import merged_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.config import load_config
from lowbit_ft.model.linear import packed_op_only
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.stages import draw
from lowbit_ft.stages.draw import draw_pictures
from lowbit_ft.stages.runnable import torch_folder
from lowbit_ft.tasks.base import Feed, inputs_of
from lowbit_ft.tasks.image_generation import ImageGeneration
from tests.diffusion import dits
from tests.packed_tools import adapter_config, nudge, set_packed

pytest.importorskip("diffusers")
PICTURES = Pictures(3, dits.SIZE, len(dits.LABELS))
SECTION = SimpleNamespace(sequence_len=16, on_bad_row="error")


def task_of(**changes: Any) -> ImageGeneration:
    return ImageGeneration(labels=dits.LABELS, **changes)


def source(path: Path) -> Any:
    keys = ("format", "split", "name", "revision", "limit", "weight")
    return SimpleNamespace(path=str(path), **dict.fromkeys(keys))


def batches(task: ImageGeneration, path: Path, *, shuffle: bool, seed: int = 0, size: int = 4) -> Any:
    feed = Feed(SimpleNamespace(train=SimpleNamespace(seed=seed)), PICTURES)
    return task.batches(feed, None, task.examples(source(path), SECTION, PICTURES), size, shuffle=shuffle)


@pytest.mark.parametrize("prediction", PATHS)
def test_the_loss_is_its_equation(prediction: str, tmp_path: Path) -> None:
    """In float64, picture by picture; noise: the first half of a model with twice the channels."""
    task = task_of(prediction=prediction)
    path = dits.rows(tmp_path, 4)
    batch = next(iter(batches(task, path, shuffle=False).one_epoch()))
    model = dits.made(out_channels=3 if prediction == "velocity" else 6)
    given = inputs_of(batch, task.answers)
    with torch.no_grad():
        sample = model(**given).sample
    found, total = task.loss(SimpleNamespace(sample=sample), batch), 0.0
    for b, line in enumerate(path.read_text().splitlines()):
        x = PICTURES.values(Path(json.loads(line)["image"]).read_bytes()).double()
        moved, wanted, told = (batch[k][b].double() for k in ("hidden_states", "labels", "timestep"))
        if prediction == "velocity":
            t = told / 1000
            torch.testing.assert_close(moved, x + t * wanted, atol=1e-5, rtol=1e-5)  # x + t (e - x)
        else:
            kept = float(
                torch.prod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)[: int(told) + 1])
            )
            torch.testing.assert_close(
                moved, kept**0.5 * x + (1 - kept) ** 0.5 * wanted, atol=1e-5, rtol=1e-5
            )
        total += float((sample[b, :3].double() - wanted).square().mean())
    assert float(found) == pytest.approx(total, rel=1e-5) and int(task.count(batch)) == 4


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone(tmp_path: Path) -> None:
    task, path = task_of(drop_labels=0.5), dits.rows(tmp_path, 16)
    first, again = (batches(task, path, shuffle=True) for _ in range(2))
    seen = [next(first) for _ in range(6)]
    state, then = first.state_dict(), next(first)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert all(torch.equal(value, then[name]) for name, value in next(again).items())
    dropped = torch.cat([one["class_labels"] for one in seen]) == 3
    assert 0 < int(dropped.sum()) < 24
    measured = list(batches(task, path, shuffle=False).one_epoch())
    assert not any((one["class_labels"] == 3).any() for one in measured)
    other = next(iter(batches(task, path, shuffle=False, seed=1).one_epoch()))
    assert torch.equal(other["timestep"], measured[0]["timestep"])
    assert not torch.equal(other["hidden_states"], measured[0]["hidden_states"])
    none = batches(ImageGeneration(label=None), path, shuffle=False)
    assert bool((next(iter(none.one_epoch()))["class_labels"] == 3).all())


def test_calibrators_see_all_times(tmp_path: Path) -> None:
    """More looks than rows: each its own time and noise, no tenth of the way without one."""
    task, path = task_of(), dits.rows(tmp_path, 6)
    options: Any = {"rows": None, "seed": 0, "samples": 40, "sequence_len": 16, "size": 16}
    found = task.calibration(source(path), SECTION, PICTURES, **options)
    times = torch.cat([one["timestep"] for one in found]) / 1000
    assert [len(one["timestep"]) for one in found] == [16, 16, 8]
    assert all(set(one) == {"hidden_states", "timestep", "class_labels"} for one in found)
    assert all(int(((times >= i / 10) & (times < (i + 1) / 10)).sum()) >= 3 for i in range(10))


def test_rows_that_cannot_be_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    (tmp_path / "no.png").write_text("no picture")
    for row, said in (
        ({"image": str(tmp_path / "no.png"), "label": "red"}, "'image' is no picture that Pillow reads"),
        ({"image": str(tmp_path / "gone.png"), "label": "red"}, "gone.png cannot be read"),
        ({"image": "x"}, "'?label'?|cannot be read"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(DataError, match=said):
            task_of().examples(source(path), SECTION, PICTURES)


def recipe(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    found: dict[str, Any] = {
        "name": "toy",
        "model": {"path": str(checkpoint), "dtype": "float32", "device": "cpu"},
        "task": {"kind": "image_generation", "samples": 1, "sample_steps": 2},
        "quant": {
            "group_size": 32,
            "calibrate": "mse",
            "activations": {"kind": "auto", "dynamic": False, "segments": "auto"},
            "calibration": {"samples": 16},
        },
        "adapter": {"method": "lr_qat", "rank": 4, "segments": "auto"},
        "data": {"train": {"path": str(dits.rows(folder / "rows", 24))}},
        "train": {
            "max_steps": 30,
            "micro_batch_size": 12,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "learning_rate": 2e-2,
        },
        "eval": {"windows": 12},
        "export": {"format": "native"},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("dit")
    pipeline.run(load_recipe(recipe(folder, dits.write(folder / "model", num_layers=1))))
    rows = json.loads((folder / "run" / "evaluation.json").read_text())["rows"]
    return SimpleNamespace(folder=folder, run=folder / "run", rows={row["stage"]: row for row in rows})


def test_it_learns_and_what_is_trained_is_what_ships(ran: SimpleNamespace) -> None:
    assert list(ran.rows) == ["base", "quantized", "trained", "merged"]
    assert ran.rows["trained"]["loss"] < 0.9 * ran.rows["quantized"]["loss"]
    assert ran.rows["merged"]["loss"] == ran.rows["trained"]["loss"]
    errors = {stage: row["scores"]["velocity_error"] for stage, row in ran.rows.items()}
    assert errors["base"] == 0 < errors["quantized"] < errors["trained"] == errors["merged"]
    moved = json.loads((ran.run / "moved.json").read_text())
    assert any(share > 0 for name, share in moved.items() if name != "scale_change")


def test_what_ships_is_read_by_transformers_with_its_positions(ran: SimpleNamespace) -> None:
    """Positions are in no file, and are computed where the folder is read."""
    from transformers import AutoModelForImageToImage

    config = json.loads((ran.run / "merged" / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel" and config["id2label"]["2"] == "red"
    model = AutoModelForImageToImage.from_pretrained(ran.run / "merged").eval()
    assert torch.equal(model.pos_embed.pos_embed, dits.made().pos_embed.pos_embed)
    weights, layers = read_weights(ran.run / "merged"), dict(model.named_modules())
    for name, weight in weights.items():
        assert torch.equal(layers[name].base.unpack_codes(), weight.unpack_codes())
    segmented = [name for name, one in layers.items() if getattr(one, "activation", None) is not None]
    assert len(segmented) == len(weights) == 9


def test_the_report_shows_every_stage_from_the_same_noise(ran: SimpleNamespace) -> None:
    page = (ran.run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and '<section id="pictures">' in page
    sheets = [
        (ran.run / "pictures" / f"{stage}.png").read_bytes() for stage in ("base", "quantized", "trained")
    ]
    assert len(set(sheets)) == 3
    (ran.run / "pictures" / "base.png").write_bytes(b"<svg onload=...>")
    from lowbit_ft.report.page import write_report

    assert "pictures/base.png is no PNG file" in write_report(ran.run).read_text()
    (ran.run / "pictures" / "base.png").write_bytes(sheets[0])


def test_onnxruntime_says_the_same(ran: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lowbit_ft.stages.outside import export_outside

    export_outside(ran.run / "merged", "onnx", tmp_path / "graph")
    with pytest.raises(ValueError, match="an onnx folder is computed outside of torch; give the run"):
        draw_pictures(tmp_path / "graph", tmp_path / "e.png")
    merged, graph = (load_exported(folder) for folder in (ran.run / "merged", tmp_path / "graph"))
    batch = next(iter(batches(task_of(), ran.folder / "rows" / "rows.jsonl", shuffle=False).one_epoch()))
    given = inputs_of(batch, task_of().answers)
    with torch.no_grad():
        torch.testing.assert_close(graph(**given).sample, merged(**given).sample, atol=1e-2, rtol=1e-2)


def test_draw_repeats_itself_and_says_what_there_is(ran: SimpleNamespace, tmp_path: Path) -> None:
    runner, command = CliRunner(), ["draw", str(ran.run), "", "--count", "2", "--steps", "3"]
    sheets = []
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"]), ("d", ["--label", "red"])):
        command[2] = str(tmp_path / f"{name}.png")
        done = runner.invoke(app, [*command, *more])
        assert done.exit_code == 0 and done.stdout == f"{command[2]}: {2 if name == 'd' else 6} pictures\n"
        sheets.append((tmp_path / f"{name}.png").read_bytes())
    assert sheets[0] == sheets[1] and len(set(sheets)) == 3
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"labels": ["rad"]}, "--label: got 'rad'; allowed: dark, light, red; did you mean 'red'"),
        ({"steps": 0}, "--steps: got 0; allowed are 1 to 1000"),
        ({"count": 100}, "--count: got 100 of 3 labels; allowed are 256 pictures"),
        ({"guidance": -1.0}, "--guidance"),
        ({"no_text": Path("x")}, "--no-text: got x, and this model is told classes"),
    ]
    for options, said in wrong:
        with pytest.raises(ValueError, match=said):
            draw_pictures(ran.run, tmp_path / "e.png", **options)
    with pytest.raises(ValueError, match="draw takes what task: image_generation trained"):
        draw_pictures(dits.ROOT / "recipes" / "assets" / "tiny-llama", tmp_path / "e.png")


def test_a_run_that_was_exported_elsewhere_draws_from_merged(
    ran: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit_ft.stages.runnable.shipped", lambda folder: tmp_path / "exported")
    (tmp_path / "exported").mkdir()
    config = json.loads((ran.run / "merged" / "config.json").read_text())
    said = config | {"quantization_config": {"quant_method": "onnx"}}
    (tmp_path / "exported" / "config.json").write_text(json.dumps(said))
    assert torch_folder(ran.run) == ran.run / "merged"


def test_a_model_without_labels_is_asked_for_none(tmp_path: Path) -> None:
    """It learned what stands for no class, and no other."""
    purpose = ImageGeneration(label=None).purpose(0)
    checkpoint = Checkpoint.open(dits.write(tmp_path, num_layers=1), dtype="float32", purpose=purpose)
    checkpoint.config.save_pretrained(tmp_path / "out")
    config = load_config(tmp_path / "out")
    assert draw._numbers(config, []).tolist() == [len(dits.LABELS)]
    with pytest.raises(ValueError, match="--label: got 'red', and it was trained without labels"):
        draw._numbers(config, ["red"])
    for wrong, words in (
        ({"label": None, "labels": ["a"]}, "no row has a class, and labels names 1"),
        ({"labels": ["a", "a"]}, "'a' more than once"),
    ):
        with pytest.raises(ValidationError, match=words):
            ImageGeneration.model_validate(wrong)


def test_one_class_is_enough(tmp_path: Path) -> None:
    """Nothing is told apart here."""
    path = dits.rows(tmp_path, 4)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "light" in line))
    r = SimpleNamespace(data=SimpleNamespace(train=source(path)))
    made = ImageGeneration().settled(r, {})
    assert isinstance(made, ImageGeneration) and made.labels == ("light",)


INTEGER = sorted(name for name, config in ADAPTERS.items() if config.grid_name == "integer")


def test_every_integer_method_merges_to_what_it_computed(tmp_path: Path) -> None:
    folder = dits.write(tmp_path, num_layers=1)
    checkpoint = Checkpoint.open(folder, dtype="float32", purpose=task_of().purpose(0))
    section = QuantSection.model_validate(
        {"bits": 4, "group_size": 32, "residual_bits": 4, "symmetric": False}
    )
    packed = quantize(checkpoint, section, dtype=torch.float32)[0]
    batch = next(iter(batches(task_of(), dits.rows(tmp_path / "rows", 4), shuffle=False).one_epoch()))
    given = inputs_of(batch, task_of().answers)
    plain, seen = said(packed, given), []
    for method in INTEGER:
        model, config = copy.deepcopy(packed), adapter_config(method, 2)
        attach(model, config, lambda layer: checkpoint.matrix(layer, dtype=torch.float32))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in (one for one in model.parameters() if one.requires_grad):
                nudge(parameter, 0.05, config)
        trained = said(model, given)
        assert not torch.equal(trained, plain), method
        if config.exact_merge:
            merged = set_packed(copy.deepcopy(packed), dict(merged_weights(model).items()))
            assert torch.equal(said(merged, given), trained), method
            seen.append(method)
    assert "lr_qat" in seen and len(seen) > 4


@torch.no_grad()
def said(model: Any, given: dict[str, Tensor]) -> Tensor:
    with packed_op_only(model.eval()):
        return model(**given).sample


def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    dit, noisy = (dits.write(tmp_path / name) for name in ("dit", "noisy"))
    values = json.loads((noisy / "config.json").read_text())
    (noisy / "config.json").write_text(json.dumps(values | {"prediction": "noise"}))
    for changes, said in (
        ({"quant": {"smooth": {"alpha": 0.5}, "activations": None}}, "quant.smooth"),
        ({"quant": {"rotation": {"kind": "hadamard"}, "activations": None}}, "quant.rotation.kind"),
        ({"task": {"labels": ["a", "b", "c", "d"]}}, r"knows 3 classes \(num_embeds_ada_norm\)"),
        ({"task": {"train_head": True}}, "task.train_head"),
        ({"model": {"path": str(noisy)}}, "trained to say 'noise'.*set task.prediction: noise"),
        ({"export": {"format": "gguf"}}, "export.format"),
        ({"train": {"signal": {"kind": "layers"}}}, "train.signal.kind"),
    ):
        plain = {"quant": {"activations": None}, "adapter": {"segments": "none"}}
        file = recipe(tmp_path, dit, **plain | changes)
        with pytest.raises(RecipeError, match=said):
            load_recipe(file)
