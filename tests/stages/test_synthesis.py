"""A recipe without any data file: the whole line, gptq on the rows that the model wrote, and going on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowbit_ft import pipeline
from lowbit_ft.data.synthesis.base import Shard
from lowbit_ft.data.synthesis.folder import RowsFolder
from lowbit_ft.files.manifest import MANIFEST
from lowbit_ft.integrations.adapter_files import read_adapter
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.session import resume, start
from lowbit_ft.stages import synthesis
from lowbit_ft.stages.synthesis import read_state, train_source, valid_source, writer
from tests.forks import Forked, run

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "data.sequence_len=48",
    "data.synthesis.samples=24",
    "data.synthesis.valid=4",
    "data.synthesis.batch_size=8",
    "train.max_steps=2",
    "train.micro_batch_size=2",
    "train.eval_every=2",
    "train.save_every=2",
    "eval.windows=2",
    "eval.window=48",
    "eval.kl=false",
    "eval.generate=[]",
    "quant.calibration={samples: 4, sequence_len: 48}",
    "quant.targets=['*.layers.0.*']",
]


def recipe(output: Path, *overrides: str):
    return load_recipe(
        ROOT / "recipes/quickstart-data-free.yaml",
        [*SHORT, f"output={output}", f"model.path={ROOT}/recipes/assets/tiny-llama", *overrides],
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.jsonl")}


def test_the_whole_line_without_a_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shipped = pipeline.run(recipe(run))
    out = capsys.readouterr().out
    state = read_state(run / "synthesis")
    assert state.done and state.by == "dense" and f"synthesis: {state}" in out
    assert f"data: {state.count('train')} of {state.count('train')} rows used" in out
    assert "columns not read" not in out and "equal bit for bit" in out
    assert "valid_loss" in (run / "metrics.jsonl").read_text() and shipped.is_dir()
    base, rows = (run / "base.json").read_text(), files(run / "synthesis")
    report = (run / "report.html").read_text()
    assert "Rows that the model wrote" in report and f"{state.count('train')}" in report
    with resume(run) as session:  # what evaluate and the other commands look at
        assert train_source(session).format == "tokens" and valid_source(session) is not None
    _, trained, _ = read_adapter(run / "adapter")

    pipeline.run(recipe(run))  # again: nothing is written, packed or trained again
    out = capsys.readouterr().out
    assert "synthesis: reusing" in out and "base: reusing" in out
    assert (run / "base.json").read_text() == base and files(run / "synthesis") == rows
    _, again, _ = read_adapter(run / "adapter")
    assert all(torch.equal(trained[key], again[key]) for key in trained)

    for part, command in (
        ("train", lambda: pipeline.run(recipe(run))),
        ("valid", lambda: pipeline.evaluate(run)),
    ):
        name = next(name for name in rows if name.startswith(f"{part}/"))
        (run / "synthesis" / name).write_bytes(rows[name] + b"\n")
        with pytest.raises(ValueError, match=f"{name}: its content is not the one that was written"):
            command()
        (run / "synthesis" / name).unlink()
        with pytest.raises(ValueError, match=f"{name}: missing; run the line again"):
            pipeline.evaluate(run) if part == "valid" else read_train(run)
        pipeline.quantize(recipe(run))  # the stage that writes them first
        assert files(run / "synthesis") == rows


def read_train(run: Path) -> None:
    with resume(run) as session:
        train_source(session)


def test_quantize_alone_has_its_rows_first(tmp_path: Path) -> None:
    pipeline.quantize(recipe(tmp_path / "gptq"))
    assert read_state(tmp_path / "gptq" / "synthesis").done
    (tmp_path / "gptq" / "synthesis" / "train" / "mine.jsonl").write_text('{"ids": [5, 6, 7]}\n')
    with pytest.raises(ValueError, match="mine.jsonl: no row there is the model's.*as data.train"):
        read_train(tmp_path / "gptq")
    pipeline.quantize(recipe(tmp_path / "mse", "quant.calibrate=mse"))
    assert not (tmp_path / "mse" / "synthesis").exists(), "mse looks at no row"


def test_packed_to_8_bits_it_writes_nearly_the_same(tmp_path: Path) -> None:
    for by in ("dense", "packed"):
        pipeline.quantize(recipe(tmp_path / by, f"data.synthesis.by={by}"))
    assert read_state(tmp_path / "packed" / "synthesis").by == "packed"
    with resume(tmp_path / "dense") as session, torch.no_grad():
        ids = torch.tensor([[5, 300, 17, 40, 2000, 9, 88, 1024]])
        dense, packed = (
            writer(session, by)(input_ids=ids).logits.log_softmax(-1) for by in ("dense", "packed")
        )
        assert 0 < float((dense.exp() * (dense - packed)).sum(-1).mean()) < 1e-3


def test_where_the_dense_model_does_not_fit_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthesis, "free_ram", lambda: 1_000_000)
    pipeline.quantize(recipe(tmp_path / "run"))
    assert read_state(tmp_path / "run" / "synthesis").by == "packed"
    assert "packed to 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["logits", "layers"])
def test_rows_of_a_task_are_taught_by_a_teacher(tmp_path: Path, kind: str) -> None:
    """Their answers alone carry the loss; what layers make is compared everywhere."""
    task = (
        "{kind: task_labels, prompt: 'Name it. def {input}', samples: 16, batch_size: 16, input_tokens: 20, "
    )
    task += "answer_tokens: 8, p_low: 0.0, until: ['(', ' '], answers: [good, bad], filter: {min_tokens: 1}}"
    signal = "{kind: layers, losses: {logits: 1, hidden: 1, outputs: 1}}" if kind == "layers" else kind
    given = [
        f"data.synthesis={task}",
        "quant.calibrate=mse",
        "train.teacher=residual",
        "train.eval_every=null",
    ]
    given.append(f"train.signal={signal}" if kind == "layers" else "train.signal={kind: logits}")
    pipeline.train(recipe(tmp_path / "run", *given, "quant.targets=all-linear", "train.max_steps=1"))
    (first,) = [r for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "loss" in r]
    names = {"logits_loss", "hidden_loss", "outputs_loss"} if kind == "layers" else {"logits_loss"}
    assert all(first[name] > 0 for name in names if kind == "layers") and first["loss"] > 0
    state = read_state(tmp_path / "run" / "synthesis")
    assert state.count("train") and set(state.answers) <= {"good", "bad"}


def test_rows_are_made_anew_for_another_image_processor(tmp_path: Path) -> None:
    """It is in none of the files of weights, and a picture that was made for one is another for the next."""
    folder = Path(shutil.copytree(ROOT / "recipes/assets/tiny-rtdetr", tmp_path / "model"))
    changes = [f"model.path={folder}", f"output={tmp_path / 'run'}"]
    recipe = load_recipe(ROOT / "recipes/quickstart-image-data-free.yaml", changes)

    def key() -> str:
        checkpoint = Checkpoint.open(folder, purpose=recipe.task.purpose(0))
        config = recipe.data.synthesis
        assert config is not None
        return synthesis.synthesis_key(SimpleNamespace(recipe=recipe, checkpoint=checkpoint), config)  # pyright: ignore[reportArgumentType]

    before, file = key(), folder / "preprocessor_config.json"
    (folder / "README.md").write_text("a card")
    assert key() == before
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_rescale": False}))
    assert key() != before


def test_a_recipe_that_makes_no_rows_leaves_those_there(tmp_path: Path) -> None:
    """Rows of another recipe go when theirs can be made, and not before."""
    session = start(recipe(tmp_path / "run", "data.synthesis.starts=100000"))
    try:
        shard = Shard(3)
        shard.lines["train"].append({"row": 0, "input_ids": [1, 2, 3]})
        RowsFolder(session.run / "synthesis", "of another recipe").put(0, shard)
        before = files(tmp_path)
        with pytest.raises(ValueError, match="starts: got 100000"):
            synthesis.synthesis_stage(session)
        assert before and files(tmp_path) == before
    finally:
        session.run.close()


def test_no_row_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row is left to train on .*repetition 24.*loosen"):
        nothing_twice = "data.synthesis.filter={min_tokens: 1, ngram: 1, max_repetition: 0.001}"
        pipeline.quantize(recipe(tmp_path / "run", nothing_twice))


@pytest.mark.slow
def test_a_killed_run_writes_the_same_rows(tmp_path: Path) -> None:
    pipeline.quantize(recipe(tmp_path / "whole", "data.synthesis.samples=64", "data.synthesis.batch_size=4"))
    given = [*SHORT, "data.synthesis.samples=64", "data.synthesis.batch_size=4", f"output={tmp_path / 'run'}"]
    command = ["-m", "lowbit_ft", "quantize", "recipes/quickstart-data-free.yaml", *given]
    manifest = tmp_path / "run" / "synthesis" / MANIFEST
    process = Forked(command)
    while process.poll() is None and not (manifest.exists() and len(_shards(manifest)) >= 3):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not read_state(tmp_path / "run" / "synthesis").done, "it was killed too late to show anything"
    again = run(command)
    assert again.returncode == 0, again.stderr
    assert files(tmp_path / "run" / "synthesis") == files(tmp_path / "whole" / "synthesis")


def _shards(manifest: Path) -> dict[str, object]:
    return json.loads(manifest.read_text())["shards"]


BAD = [
    (
        "data.synthesis.kind=self_generatd",
        "got 'self_generatd'; allowed: kind: self_generated, self_chat, task_labels, task_images; did you",
    ),
    (
        "data.synthesis={samples: 4}",
        "data.synthesis: got no kind; allowed: kind: self_generated, self_chat, task_",
    ),
    ("data.synthesis.sampels=4", "data.synthesis.sampels: unknown key; did you mean 'samples'?"),
    ("data.synthesis.filter.min_token=4", "filter.min_token: unknown key; did you mean 'min_tokens'?"),
    ("data.synthesis.temperature=0", "data.synthesis.temperature: got 0"),
    ("data.synthesis.deterministic_prefix=[3, 60]", "deterministic_prefix: got 60 of rows of 48 tokens"),
    ("data.synthesis.max_len=64", "max_len: got 64, more than a window of 48 tokens"),
    ("data.synthesis.valid=24", "valid 24 of samples 24; leave rows for training"),
    (
        "data.synthesis.valid=0",
        "train.eval_every: got 2, but there is no data.valid; set data.synthesis.valid",
    ),
    ("data.train={path: x.jsonl, format: text}", "beside data.synthesis, which writes the training rows"),
    ("data.synthesis=null", "data.train: missing; add `train: ...` (training rows), or `synthesis:"),
]


@pytest.mark.parametrize(("override", "words"), BAD)
def test_wrong_combinations_are_refused_with_the_way_out(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe(tmp_path / "run", override)
    assert words in str(error.value), str(error.value)
