"""task: image_generation of SD3 and Flux: rows with files of states, the whole line, diffusers' pipelines on
what ships, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lowbit_ft import pipeline
from lowbit_ft.cli.main import app
from lowbit_ft.data.errors import DataError
from lowbit_ft.diffusion.paths import PATHS, sampled
from lowbit_ft.diffusion.pictures import Pictures
from lowbit_ft.diffusion.texts import Texts
from lowbit_ft.diffusion.traits import TRAITS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.config import load_config
from lowbit_ft.model.linear import packed_op_only
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.stages.draw import _asked
from lowbit_ft.tasks.base import Feed, inputs_of
from lowbit_ft.tasks.image_generation import ImageGeneration
from tests.diffusion import dits
from tests.tasks.test_image_generation import SECTION, recipe, source

pytest.importorskip("diffusers")
SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
TOKENS = 6


def pictures(name: str) -> Pictures:
    own = dits.SIZES[name]
    texts = Texts(333, own["joint_attention_dim"], own["pooled_projection_dim"])
    return Pictures(4 if name == SD3 else 1, 128, 0, texts, TRAITS[name])


def task_of(**changes: Any) -> ImageGeneration:
    return ImageGeneration(label=None, text_tokens=TOKENS, size=dits.SIZE, **changes)


def batches(task: ImageGeneration, name: str, path: Path, *, shuffle: bool, size: int = 4) -> Any:
    feed = Feed(SimpleNamespace(train=SimpleNamespace(seed=0)), pictures(name))
    found = task.examples(source(path), SECTION, pictures(name))
    return task.batches(feed, None, found, size, shuffle=shuffle)


def by_hand(x: Tensor) -> Tensor:
    """[C, H, W] -> Flux's tokens, one by one."""
    c, h, w = x.shape
    rows = [
        [x[k, i + a, j + b] for k in range(c) for a in range(2) for b in range(2)]
        for i in range(0, h, 2)
        for j in range(0, w, 2)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("name", [SD3, FLUX])
def test_a_batch_is_its_equation_in_the_units_of_the_model(name: str, tmp_path: Path) -> None:
    task, path = task_of(), dits.text_rows(tmp_path, name, 4)
    batch = next(iter(batches(task, name, path, shuffle=False).one_epoch()))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for b, line in enumerate(lines):
        x = load_file(tmp_path / line["image"])["latent"]
        x = (by_hand(x) if name == FLUX else x).double()
        moved, wanted, told = (batch[k][b].double() for k in ("hidden_states", "labels", "timestep"))
        t = told / (1 if name == FLUX else 1000)
        assert 0 <= t <= 1
        torch.testing.assert_close(moved, x + t * wanted, atol=1e-5, rtol=1e-5)  # x + t (e - x)
        for key, value in load_file(tmp_path / line["text"]).items():
            assert torch.equal(batch[key][b], value)
    model = dits.made(name)
    given = inputs_of(batch, task.answers)
    if name == FLUX:
        side = torch.arange(4.0)
        given["img_ids"] = torch.cartesian_prod(torch.zeros(1), side, side)
        given["txt_ids"] = torch.zeros(TOKENS, 3)
    with torch.no_grad():
        sample = model(**given).sample
    loss = float(task.loss(SimpleNamespace(sample=sample), batch))
    total = sum(float((sample[b].double() - batch["labels"][b]).square().mean()) for b in range(4))
    assert loss == pytest.approx(total, rel=1e-5)


def test_packing_is_undone_and_places_are_those_of_its_tokens() -> None:
    seen, x = TRAITS[FLUX], torch.randn(2, 3, 6, 6)
    tokens = seen.packed(x)
    assert torch.equal(tokens[0], by_hand(x[0])) and torch.equal(seen.unpacked(tokens), x)
    assert seen.places(9, torch.device("cpu"))[5].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="got 8 tokens of a picture, which is no square"):
        seen.places(8, torch.device("cpu"))


def test_dropped_texts_are_zeros_or_the_file_that_stands_for_none(tmp_path: Path) -> None:
    path = dits.text_rows(tmp_path, SD3, 12)
    empty = dits.states(tmp_path / "empty.safetensors", SD3, 99)
    for no_text in (None, str(empty)):
        task = task_of(drop_labels=0.5, no_text=no_text)
        stream = batches(task, SD3, path, shuffle=True)
        pooled = torch.cat([next(stream)["pooled_projections"] for _ in range(6)])
        none = torch.zeros(64) if no_text is None else load_file(empty)["pooled_projections"]
        assert 0 < int((pooled == none).all(1).sum()) < 24
        measured = torch.cat(
            [b["pooled_projections"] for b in batches(task, SD3, path, shuffle=False).one_epoch()]
        )
        assert not bool((measured == none).all(1).any())
    dits.states(empty, SD3, 98)  # another file in its place is read anew
    told = task_of(no_text=str(empty)).told(task_of().seen(pictures(SD3)), None)
    assert torch.equal(told["pooled_projections"], load_file(empty)["pooled_projections"])
    middle, even = (
        torch.cat([next(s)["timestep"] for _ in range(40)])
        for s in (batches(task_of(times=t), SD3, path, shuffle=True) for t in ("middle", "even"))
    )
    share = [float(((t > 250) & (t < 750)).float().mean()) for t in (middle, even)]
    assert share[0] == pytest.approx(0.728, abs=0.1) and share[1] == pytest.approx(0.5, abs=0.1)


def wrong_states(folder: Path) -> Iterator[tuple[Any, str]]:
    good = load_file(dits.states(folder / "good.safetensors", SD3, 0))
    hidden, pooled = "encoder_hidden_states", "pooled_projections"
    for number, (values, said) in enumerate(
        (
            ({hidden: good[hidden]}, f"no {pooled}; allowed: {hidden} \\[6, 32\\] and {pooled} \\[64\\]"),
            (
                good | {hidden: good[hidden][:5].clone()},
                r"\[5, 32\] float32; allowed: .* \[6, 32\].*text_tokens",
            ),
            (good | {pooled: torch.zeros(64, dtype=torch.int64)}, f"holds {pooled} \\[64\\] int64"),
            (good | {hidden: good[hidden] / 0}, f"numbers in {hidden} that are not finite"),
            (good | {pooled: torch.full((64,), 1e300, dtype=torch.float64)}, f"in {pooled} that are not"),
            (good | {pooled: torch.full((64,), torch.nan).to(torch.float8_e4m3fn)}, f"in {pooled} that are"),
        )
    ):
        save_file(values, folder / f"{number}.st")
        yield f"{number}.st", said
    (folder / "no.st").write_bytes(b"PK\3\4 no tensors")
    yield "no.st", "no.st must be a .safetensors file of what a text encoder says.*cannot be read"
    yield "gone.st", "gone.st cannot be read: No such file"
    yield 7, "must be the path of a file, or its bytes; got"


def test_states_are_checked_where_they_are_read(tmp_path: Path) -> None:
    path = dits.text_rows(tmp_path, SD3, 1)
    image = json.loads(path.read_text())["image"]
    for text, said in wrong_states(tmp_path):
        path.write_text(json.dumps({"image": image, "text": text}))
        with pytest.raises(DataError, match=f"rows.jsonl:1: 'text'.*{said}"):
            task_of().examples(source(path), SECTION, pictures(SD3))
    path = dits.text_rows(tmp_path, SD3, 1)
    found = task_of().examples(source(path), SECTION, pictures(SD3))
    before = found.digest
    dits.states(tmp_path / "text-0.safetensors", SD3, 5)
    with pytest.raises(DataError, match="was changed while the run reads it"):
        task_of().told(task_of().seen(pictures(SD3)), found[0])
    assert task_of().examples(source(path), SECTION, pictures(SD3)).digest != before


@pytest.fixture(scope="module", params=[SD3, FLUX])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    name, folder = request.param, tmp_path_factory.mktemp("texts")
    guided = {"guidance_embeds": True} if name == FLUX else {}
    checkpoint = dits.write(folder / "model", name, num_layers=1, **guided)
    rows = dits.text_rows(folder / "texts", name, 12)
    file = recipe(
        folder,
        checkpoint,
        task={"text_tokens": TOKENS, "size": dits.SIZE},
        data={"train": {"path": str(rows)}},
        train={"max_steps": 12, "learning_rate": 1e-2, "micro_batch_size": 6},
        eval={"windows": 6},
    )
    pipeline.run(load_recipe(file))
    stages = json.loads((folder / "run" / "evaluation.json").read_text())["rows"]
    return SimpleNamespace(
        name=name, folder=folder, run=folder / "run", rows={row["stage"]: row for row in stages}
    )


def test_it_learns_and_what_is_trained_is_what_ships(ran: SimpleNamespace) -> None:
    assert ran.rows["trained"]["loss"] < ran.rows["quantized"]["loss"]
    assert ran.rows["merged"]["loss"] == ran.rows["trained"]["loss"]
    config = json.loads((ran.run / "merged" / "config.json").read_text())
    assert (config["text_tokens"], config["picture_size"], config["prediction"]) == (6, 8, "velocity")
    assert "pipeline_tag: text-to-image" in (ran.run / "merged" / "README.md").read_text()
    sheets = [
        (ran.run / "pictures" / f"{stage}.png").read_bytes() for stage in ("base", "quantized", "trained")
    ]
    assert len(set(sheets)) == 3


def test_the_pipeline_of_diffusers_draws_the_same_with_what_ships(ran: SimpleNamespace) -> None:
    """Its own packing, positions, times and guidance; no encoder and no autoencoder beside."""
    diffusers: Any = importlib.import_module("diffusers")
    model = load_exported(ran.run / "merged", dtype=torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    texts = [load_file(dits.states(ran.folder / "t.safetensors", ran.name, 7)), None]
    texts[1] = {key: torch.zeros_like(value) for key, value in texts[0].items()}
    prompt, empty = ({key: value[None] for key, value in one.items()} for one in texts)
    given = {
        "prompt_embeds": prompt["encoder_hidden_states"],
        "pooled_prompt_embeds": prompt["pooled_projections"],
    }
    noise, steps = torch.randn(1, 4 if ran.name == SD3 else 1, 8, 8), 5
    options: dict[str, Any] = {"height": 64, "width": 64, "sigmas": [1 - i / steps for i in range(steps)]}
    options |= {"num_inference_steps": steps, "output_type": "latent"}
    if ran.name == SD3:
        beside = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=model.made, scheduler=scheduler, **parts, **beside
        )
        given["negative_prompt_embeds"] = empty["encoder_hidden_states"]
        given["negative_pooled_prompt_embeds"] = empty["pooled_projections"]
        options |= {"latents": noise, "guidance_scale": 2.0}
    else:
        pipe = diffusers.FluxPipeline(transformer=model.made, scheduler=scheduler, **parts)
        options |= {"latents": TRAITS[FLUX].packed(noise), "guidance_scale": 3.5}
    pipe.set_progress_bar_config(disable=True)
    with packed_op_only(model), torch.no_grad():
        theirs = pipe(**given, **options).images
        ours = sampled(model, PATHS["velocity"], prompt, empty, noise, steps, 2.0 if ran.name == SD3 else 1.0)
    torch.testing.assert_close(TRAITS[ran.name].packed(ours), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ran", [SD3], indirect=True)  # of Flux it holds too, and takes twice as long
def test_onnxruntime_says_the_same(ran: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lowbit_ft.stages.outside import export_outside

    export_outside(ran.run / "merged", "onnx", tmp_path / "graph")
    merged, graph = (load_exported(folder) for folder in (ran.run / "merged", tmp_path / "graph"))
    batch = next(
        iter(batches(task_of(), ran.name, ran.folder / "texts" / "rows.jsonl", shuffle=False).one_epoch())
    )
    given = inputs_of(batch, task_of().answers)
    with torch.no_grad():
        torch.testing.assert_close(graph(**given).sample, merged(**given).sample, atol=1e-2, rtol=1e-2)


def test_draw_takes_texts(ran: SimpleNamespace, tmp_path: Path) -> None:
    text = str(ran.folder / "texts" / "text-0.safetensors")
    command = ["draw", str(ran.run), str(tmp_path / "a.png"), "--count", "2", "--steps", "2"]
    done = CliRunner().invoke(app, [*command, "--text", text, "--no-text", text, "--guidance", "2"])
    assert done.exit_code == 0 and done.stdout.endswith("a.png: 2 pictures\n"), done.output
    command[2] = str(tmp_path / "b.png")
    for options, said in (
        ([], "this model is told texts; give --text FILE"),
        (["--label", "red", "--text", text], "got ['red'], and this model is told texts"),
        (["--text", str(ran.run / "metrics.jsonl")], "metrics.jsonl: must be a .safetensors file"),
        (["--text", text, "--count", "256", "--text", text], "--count: got 256 of 2 texts; allowed are 256"),
    ):
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code and said in str(done.exception or "") + done.output


def test_guidance_is_against_the_no_text_that_was_learned(tmp_path: Path) -> None:
    """Zeros in its place are a text that the model has never seen, and draw other pictures in silence."""
    file = dits.states(tmp_path / "none.safetensors", SD3, 7)
    folder = dits.write(tmp_path / "model", SD3)
    values = json.loads((folder / "config.json").read_text())
    for no_text in (str(file), None):
        said = task_of(no_text=no_text).purpose(0).values
        (folder / "config.json").write_text(json.dumps(values | dict(said)))
        config = load_config(folder)
        assert config.no_text == (no_text is not None)
        for given, guidance in ((None, 1.0), (file, 2.0), *(((None, 2.0),) if no_text is None else ())):
            _, without = _asked(config, (), [file], given, guidance)
            assert bool(without["pooled_projections"].any()) == (given is not None)
        if no_text is not None:
            with pytest.raises(ValueError, match=r"--guidance: got 2, .*--no-text FILE, or --guidance 1"):
                _asked(config, (), [file], None, 2.0)


def test_sizes_of_a_config_are_not_trusted(tmp_path: Path) -> None:
    folder = dits.write(tmp_path, SD3)
    values = json.loads((folder / "config.json").read_text())
    for wrong in ("many", 0, 1 << 30, True):
        (folder / "config.json").write_text(json.dumps(values | {"text_tokens": wrong}))
        with pytest.raises(CheckpointError, match="text_tokens: got .*; allowed: whole numbers of 1 to"):
            load_config(folder)


def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    models = {name: dits.write(tmp_path / name, name) for name in (SD3, FLUX, "DiTTransformer2DModel")}
    plain = {"quant": {"activations": None}, "adapter": {"segments": "none"}}
    for name, changes, said in (
        (SD3, {"task": {"prediction": "noise"}}, "set task.prediction: velocity"),
        (SD3, {"task": {"labels": ["a"]}}, "knows no classes; remove task.labels"),
        (SD3, {"task": {"size": 7}}, r"task.size: got 7; allowed: multiples of 2 up to 192"),
        (FLUX, {"task": {"size": 7}}, r"task.size: got 7; allowed: multiples of 2\b"),
        (FLUX, {"task": {"distilled_guidance": 2.0}}, "was not distilled with a guidance"),
        (FLUX, {"quant": {"calibrate": "gptq"}}, "a chain of layers, which this model is not; set mse"),
        (
            "DiTTransformer2DModel",
            {"task": {"text_tokens": 3}},
            "told classes and no texts; remove task.text_tokens",
        ),
        ("DiTTransformer2DModel", {"task": {"size": 16}}, "positions are those of 8 x 8"),
    ):
        both = {key: plain.get(key, {}) | changes.get(key, {}) for key in {**plain, **changes}}
        with pytest.raises(RecipeError, match=said):
            load_recipe(recipe(tmp_path, models[name], **both))
    rows = dits.text_rows(tmp_path / "texts", SD3, 3)
    bad = {"text_tokens": 5, "no_text": str(tmp_path / "texts" / "text-0.safetensors")}
    made = load_recipe(recipe(tmp_path, models[SD3], task=bad, data={"train": {"path": str(rows)}}))
    with pytest.raises(
        DataError, match=r"task.no_text: .*text-0.safetensors: holds .* allowed: .* \[5, 32\]"
    ):
        made.task.settled(made, json.loads((models[SD3] / "config.json").read_text()))
