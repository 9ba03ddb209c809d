"""data.synthesis task_images: inversion, what is stored, adaptive labels, and a line to which no real row
comes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lowbit_ft import pipeline
from lowbit_ft.data import read
from lowbit_ft.data.synthesis import SYNTHESIS
from lowbit_ft.data.synthesis.base import Given
from lowbit_ft.data.synthesis.folder import RowsFolder, fill, read_state
from lowbit_ft.data.synthesis.invert import Frame, Inversion, invert, noise, stored, variation
from lowbit_ft.data.synthesis.priors import Patches
from lowbit_ft.export.reader import read_weights
from lowbit_ft.model.images import picture_of, pixels, read_processor
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
VIT = ROOT / "recipes" / "assets" / "tiny-vit-shapes"
SHAPES = ("circle", "square", "triangle", "cross")


@pytest.fixture(scope="module")
def processor() -> Any:
    return read_processor(VIT)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForImageClassification

    found = AutoModelForImageClassification.from_pretrained(VIT, dtype=torch.float32).eval()
    return found.requires_grad_(False)


def labeller() -> Any:
    task = TASKS["image_classification"].model_validate({"kind": "image_classification", "labels": SHAPES})
    return task.labeller(None)


def maker(processor: Any, **keys: Any) -> Any:
    given = {"kind": "task_images", "samples": 6, "batch_size": 4, "steps": 6, "check_every": 3, **keys}
    config = SYNTHESIS["task_images"].model_validate(given)
    return config.maker(Given(processor, [], None, config.longest(0), labeller()))


# ------------------------------------------------------------------------------------------------ inversion


def test_what_the_processor_does_is_undone(processor: Any) -> None:
    frame = Frame(processor)
    x = stored(torch.rand(3, 32, 32)).float() / 255
    picture = Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy())
    assert torch.allclose(frame(x), pixels(processor, picture), atol=1e-5)

    class Cut:  # makes 32 x 32 of whatever it gets, its middle enlarged
        def __call__(self, picture: Any, **_: Any) -> Any:
            return processor(picture.crop((2, 2, picture.width - 2, picture.height - 2)), return_tensors="pt")

    with pytest.raises(ValueError, match="resizes or cuts even pictures of the size that it makes"):
        Frame(Cut())


def test_the_best_iterate_is_kept(model: Any, processor: Any) -> None:
    frame, seen = Frame(processor), []
    how = Inversion(steps=9, check_every=3, rate=0.3, prior=1.0, variation=0.1, task=1.0)
    prior, by = Patches(model), labeller()

    def revise(step: int, images: torch.Tensor, answers: list[Any]) -> list[Any]:
        seen.append(images.clone())
        return answers

    wanted = [0, 1, 2]
    with prior.watched():
        best, _ = invert(
            model, noise(0, range(3), frame, 0), frame, how, prior, by, wanted, lambda n: None, revise
        )

        def loss(image: torch.Tensor) -> float:
            with torch.no_grad():
                prior.seen.clear()
                task = by.loss(model, frame(image), wanted)
                return float(prior.loss() + 0.1 * variation(image) + task)

        checked = [stored((seen[i - 1] - frame.low) / frame.span).float() / 255 for i in (3, 6, 9)]
        losses = [loss(x) for x in checked]
        assert loss(best.float() / 255) == pytest.approx(min(losses), abs=1e-5)
        assert min(losses) < loss(noise(0, range(3), frame, 0))


def test_images_are_made_for_labels_and_stored_as_rows(model: Any, processor: Any, tmp_path: Path) -> None:
    """What the task reads of the folder is what was made; a stopped folder goes on to the same bytes; images
    that only the prior shapes have the label that the model says of their file."""

    class Stopped(Exception):
        pass

    def run(folder: Path, stop: bool = False, **keys: Any) -> None:
        def tell(rows: int, steps: int) -> None:
            if stop and rows:
                raise Stopped

        rows = RowsFolder(folder, "key")
        rows.by(lambda: "dense")
        fill(rows, maker(processor, **keys), 4, model, tell)

    drawn = {"labels": "drawn", "steps": 24, "weights": {"prior": 0.1, "variation": 0.0}}
    run(tmp_path / "whole", valid=1, **drawn)
    state = read_state(tmp_path / "whole")
    assert (state.count("train"), state.count("valid"), state.unit) == (5, 1, "image steps")
    assert state.own_score["accuracy"] == 1.0 and state.answers["circle"] == 2
    with pytest.raises(Stopped):
        run(tmp_path / "part", stop=True, valid=1, **drawn)
    run(tmp_path / "part", valid=1, **drawn)
    whole = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*.*")}
    assert len(whole) == 6 + 2 + 1 + 1  # images, two shards of train, one of valid, the manifest
    assert all((tmp_path / "part" / name).read_bytes() == data for name, data in whole.items())
    task = TASKS["image_classification"].model_validate({"kind": "image_classification", "labels": SHAPES})
    section = SimpleNamespace(sequence_len=8, on_bad_row="error")
    rows = task.examples(
        SimpleNamespace(path=str(tmp_path / "whole" / "train"), split="train"), section, None
    )
    assert [row["labels"] for row in rows] == [1, 2, 3, 0, 1] and not rows.report.unread

    run(tmp_path / "own", samples=4)
    lines = [json.loads(x) for x in (tmp_path / "own" / "train" / "00000.jsonl").open()]
    for row in lines:
        picture = picture_of((tmp_path / "own" / "train" / row["image"]).read_bytes())
        with torch.no_grad():
            said = model(pixel_values=pixels(processor, picture)[None]).logits.argmax(-1)
        assert row["label"] == SHAPES[int(said)]
    run(tmp_path / "none", samples=4, confidence=1.0)
    assert read_state(tmp_path / "none").reasons == {"the model is not sure": 4}
    lines = [json.loads(x) for x in (tmp_path / "none" / "dropped" / "00000.jsonl").open()]
    assert all(row.keys() == {"row", "dropped"} for row in lines), "it names an image that is not kept"


def test_a_few_images_are_in_memory_at_a_time_while_the_model_is_measured(model: Any) -> None:
    alive, most, answers = [0], [0], [0] * 100

    def images() -> Any:
        for _ in answers:
            image = torch.zeros(3, model.config.image_size, model.config.image_size)
            weakref.finalize(image, lambda: alive.__setitem__(0, alive[0] - 1))
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield image
            del image

    with torch.no_grad():
        labeller().score(model, images(), answers)
    assert 1 < most[0] <= 2 * 32 + 1 and alive[0] == 0


def test_a_loss_that_is_no_number_is_told(processor: Any, model: Any, tmp_path: Path) -> None:
    """Of NaN nothing is less than anything: the noise that was there before the first step would be kept."""
    made = maker(processor, labels="drawn", weights={"prior": 0, "variation": 1e39, "task": 1.0})
    with pytest.raises(ValueError, match="the loss of the images is no number.*data.synthesis.weights"):
        fill(RowsFolder(tmp_path, "key"), made, 4, model, lambda *_: None)


def test_an_image_begins_alike_in_any_company(processor: Any) -> None:
    frame = Frame(processor)
    together = noise(3, range(5), frame, 0)
    assert torch.equal(together[2], noise(3, [2], frame, 0)[0])
    assert not torch.equal(together[2], noise(3, [2], frame, 1)[0])
    assert abs(float(together.mean()) - 0.5) < 0.01 and abs(float(together.std()) - 0.24) < 0.02


WRONG = [
    ({"samples": None}, "give a number"),
    ({"weights": {"prior": 0, "task": 1}}, "nothing shapes an image"),
    ({"labels": "adaptive", "steps": 40}, "adapt.begin 60 of 40 steps"),
    ({"labels": "drawn", "weights": {"task": 0}}, "weights.task: got 0 with labels: drawn"),
    (
        {"labels": "adaptive", "steps": 80, "adapt": {"begin": 10, "every": 100}},
        "the first look at the labels is at step 100",
    ),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_keys_that_make_no_image_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        SYNTHESIS["task_images"].model_validate({"kind": "task_images", **change})
    assert words in str(error.value)


# ------------------------------------------------------------------------------------------------ the line


def test_no_real_row_comes_to_it_and_codes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe of a detector, in short: a reader that refuses every row that the model did not make; an
    adapter without codes; one box at least in each image."""
    monkeypatch.chdir(ROOT)
    run, plain = tmp_path / "run", read._read_files

    def watched(files: list[Path]) -> Any:
        for file in files:
            assert (run / "synthesis") in file.parents, f"{file} is a real row"
        return plain(files)

    monkeypatch.setattr(read, "_read_files", watched)
    with pytest.raises(AssertionError, match="is a real row"):
        list(read.read_rows(SimpleNamespace(path="recipes/assets/boxes/valid.parquet", split="train")))
    short = ["data.synthesis.samples=6", "data.synthesis.valid=2", "data.synthesis.batch_size=3"]
    short += ["data.synthesis.steps=2", "data.synthesis.labels=adaptive", "data.synthesis.adapt.begin=1"]
    short += ["data.synthesis.adapt.every=1", "train.max_steps=2", "train.micro_batch_size=2"]
    short += ["train.eval_every=2", "quant.calibration.samples=2", f"output={run}"]
    recipe = load_recipe(ROOT / "recipes/quickstart-image-data-free.yaml", short)
    pipeline.train(recipe)
    assert "task_images, 6 of 6 rows" in capsys.readouterr().out
    base, merged = read_weights(run / "base"), read_weights(run / "merged")
    assert base.keys() == merged.keys() and len(base) > 20
    for name in base:
        assert torch.equal(base[name].unpack_codes(), merged[name].unpack_codes()), name
    state = read_state(run / "synthesis")
    assert "map" in state.own_score and state.count("train") == 4
    lines = [json.loads(x) for f in (run / "synthesis").glob("[tv]*/*.jsonl") for x in f.open()]
    assert len(lines) == 6 and all(row["objects"]["bbox"] for row in lines)
    pipeline.report(run)
    assert "data:image/png" in (run / "report.html").read_text()


REFUSED = [
    ("task=image_classification", "model.path=recipes/assets/tiny-vit", "has no head for it yet"),
    ("task={kind: object_detection, labels: [cat, dog]}", "output=x", "leave labels out"),
    ("task={kind: object_detection, labels: [square, circle, triangle]}", "output=x", "leave labels out"),
    ("data.synthesis.kind=task_imagse", "output=x", "did you mean 'task_images'?"),
    ("data.synthesis={kind: self_generated}", "output=x", "its rows are images; set kind: task_images"),
]


@pytest.mark.parametrize(("first", "second", "words"), REFUSED)
def test_tasks_that_cannot_answer_are_refused(
    first: str, second: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError) as error:
        load_recipe(ROOT / "recipes/quickstart-image-data-free.yaml", [first, second])
    assert words in str(error.value), str(error.value)


def test_images_are_not_for_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="whose rows are images, with a task that reads text"):
        load_recipe(ROOT / "recipes/quickstart-data-free.yaml", ["data.synthesis={kind: task_images}"])
