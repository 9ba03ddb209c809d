"""The doors that fuzz.py knocks at: for each kind of file, what a user's command does with it first.

`change_*` does the harm, `read_*` is the door: it returns when it took the file and what it took makes sense;
it raises Nonsense when it took it and it does not; and whatever else it raises is the answer that is judged.
"""

from __future__ import annotations

import json
import math
import random
import re
import traceback
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

from lowbit_ft.data.examples import load_examples
from lowbit_ft.export.base import check_values
from lowbit_ft.export.folder import check_files
from lowbit_ft.export.reader import read_weights
from lowbit_ft.files.records import PackedBase
from lowbit_ft.integrations.adapter_files import read_adapter
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model, load_tokenizer
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.incoming import resolve_quant
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.data import DataSection, DataSource
from lowbit_ft.recipe.sections.model import ModelSection
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.report import plots
from lowbit_ft.report.page import write_report
from lowbit_ft.rundir import RunDir
from lowbit_ft.session import resume
from lowbit_ft.stages.card import card
from lowbit_ft.train.checkpoint import Checkpoints

from .fuzz_mutate import mutate_bytes, mutate_file, mutate_header, mutate_tree

PACKED = ("gptq", "awq", "compressed-tensors")
PICTURES = 20  # one run in so many has its pictures drawn
ROWS = ("chat", "alpaca", "completion", "text")
TOKENIZER: list[Any] = []  # of the honest files, loaded once


class Nonsense(Exception):
    """A file was taken, and what was made of it is wrong."""


def change_recipe(folder: Path, rng: random.Random) -> tuple[str, str]:
    path = folder / "recipe.yaml"
    data = path.read_bytes()
    path.unlink()
    if rng.random() < 0.75:
        tree, what = mutate_tree(yaml.safe_load(data), rng)
        path.write_text(yaml.safe_dump(tree, allow_unicode=False))
    else:
        new, what = mutate_bytes(data, rng)
        path.write_bytes(new)
    return what, "recipe.yaml"


def read_recipe(folder: Path, name: str) -> None:
    """recipe.yaml, read and checked as `plan` and `run` do."""
    recipe = load_recipe(folder / name)
    notes(recipe)
    again = folder / "again.yaml"
    again.write_text(recipe.to_yaml())
    if load_recipe(again, check=False) != recipe:
        raise Nonsense("what the recipe is written as is another recipe")


def change_rows(folder: Path, rng: random.Random) -> tuple[str, str]:
    name = f"{rng.choice(ROWS)}.jsonl"
    return mutate_file(folder / name, rng), name


def read_rows(folder: Path, name: str) -> None:
    """A data set, read into windows as before a run."""
    source = DataSource(path=str(folder / name), format=name.partition(".")[0])
    tokenizer = TOKENIZER[0]
    for length, packing in ((64, True), (16, False)):
        section = DataSection(train=source, sequence_len=length, packing=packing)
        for window in load_examples(source, section, tokenizer):
            if len(window.input_ids) != len(window.labels) or len(window.input_ids) > length:
                raise Nonsense("a window whose tokens and labels differ in number, or too long")
            if not all(0 <= token < len(tokenizer) for token in window.input_ids):
                raise Nonsense("a token that the tokenizer has not")


def change_checkpoint(folder: Path, rng: random.Random) -> tuple[str, str]:
    name = rng.choice(
        ["config.json"] * 5 + ["generation_config.json", "tokenizer_config.json", "tokenizer.json"]
        + ["chat_template.jinja", "model.safetensors", "model.safetensors"]
    )  # fmt: skip
    change = mutate_header if name.endswith(".safetensors") else mutate_file
    return change(folder / "dense" / name, rng), name


def read_checkpoint(folder: Path, name: str) -> None:
    """The JSON files of a dense checkpoint, and its headers: the model is built, filled and asked."""
    recipe = load_recipe(folder / "recipe.yaml")
    checkpoint = Checkpoint.open(recipe.model.path, dtype="float32")
    assert isinstance(recipe.data.train, DataSource), "the recipe of this benchmark has one source"
    source = recipe.data.train.model_copy(update={"limit": 4})
    load_examples(source, recipe.data, load_tokenizer(checkpoint))
    model = load_model(checkpoint)
    if model.config._attn_implementation != "sdpa":
        raise Nonsense(f"attention {model.config._attn_implementation!r}; the recipe says sdpa")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4]])).logits
    if logits.shape[:2] != (1, 4) or not torch.isfinite(logits).all():
        raise Nonsense(f"logits of shape {tuple(logits.shape)}, not all finite")


def change_packed(folder: Path, rng: random.Random) -> tuple[str, str]:
    name = rng.choice(PACKED)
    path = folder / name / "config.json"
    if rng.random() < 0.4:
        return f"{name}: {mutate_header(path.with_name('model.safetensors'), rng)}", name
    tree = json.loads(path.read_bytes())
    path.unlink()
    tree["quantization_config"], what = mutate_tree(tree["quantization_config"], rng)
    path.write_text(json.dumps(tree))
    return f"{name}: {what}", name


def read_packed(folder: Path, name: str) -> None:
    """config.json and headers of a GPTQ, AWQ or compressed-tensors checkpoint: every layer is taken over."""
    place = folder / name
    _, problems = resolve_quant(ModelSection(path=str(place)), QuantSection())
    if problems:
        raise ValueError(f"{place}: {problems[0]}")
    checkpoint = Checkpoint.open(place, dtype="float32")
    for layer in checkpoint.incoming.layers if checkpoint.incoming is not None else ():
        assert checkpoint.incoming is not None
        weight = checkpoint.incoming.weight(layer)
        check_values(weight)
        dense = weight.dequantize()
        if dense.shape != weight.shape or not torch.isfinite(dense).all():
            raise Nonsense(f"{layer} is not finite")


REPORTED = ("evaluation.json", "tasks.json", "stages.json", "quant.json", "moved.json", "trainable.json")
RUN = (
    "environment.json", "started.json", "base.json", "samples.json", "recipe.yaml", "metrics.jsonl",
    "adapter/adapter_config.json", "base/lowbit_ft.json", "base/config.json", "merged/config.json",
    "merged/lowbit_ft.json",
)  # fmt: skip


def change_run(folder: Path, rng: random.Random) -> tuple[str, str]:
    run = folder / "run"
    states = [str(path.relative_to(run)) for path in sorted(run.glob("checkpoints/step-*/*.json"))]
    name = rng.choice([n for n in (*REPORTED, *RUN, *states[-2:]) if (run / n).is_file()])
    return mutate_file(run / name, rng), name


def read_run(folder: Path, name: str) -> None:
    """One file of a run folder: the report never raises, and whoever goes on with the run is told."""
    run = folder / "run"
    # Drawing takes seconds: the tables are made in every case, the pictures in some.
    drawn = zlib.crc32(folder.name.encode()) % PICTURES == 0
    try:
        with nullcontext() if drawn else patch.object(plots, "svg", lambda figure: "<svg/>"):
            write_report(run)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"report raised {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        raise Nonsense(said) from error
    _honest_verdict(run)
    session = resume(run)
    RunDir.start(session.run.recipe_here(), main=False).close()
    card(session, "native")
    session.run.read_json("base.json", PackedBase, PackedBase())
    with session.run.stage("evaluate", torch.device("cpu"), resumable=True):
        pass
    read_adapter(run / "adapter")
    for part in ("base", "merged"):
        check_files(run / part)
        weights = read_weights(run / part)
        for layer in list(weights)[:1]:
            check_values(weights[layer])
    saved = Checkpoints(run / "checkpoints", 2)
    if (newest := saved.newest_valid()) is not None:
        saved.read(newest)


def _honest_verdict(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    if 'class="verdict good"' not in page:
        return
    rows = json.loads((run / "evaluation.json").read_bytes())["rows"]
    last = {row["stage"]: row.get("perplexity") for row in rows if isinstance(row, dict) and "stage" in row}
    values = [last.get(stage) for stage in ("trained", "merged", "exported")]
    numbers = [
        v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    ]
    recipe = run / "recipe.yaml"
    if not recipe.is_file():  # made a device: reading it would never end
        return
    native = re.search(r"format:\s*native", recipe.read_text(errors="replace"))
    if len({f"{v:.4f}" for v in numbers}) != 1 or len(numbers) < (2 if native else 3):
        raise Nonsense(f"the report calls {values} equal")


@dataclass(frozen=True)
class Kind:
    """change(folder, rng) -> (what was done, name of the file it was done to); read(folder, name) opens it;
    honest: a name to open where nothing was done; needs: what it needs of the honest files; share: of the
    cases."""

    change: Callable[[Path, random.Random], tuple[str, str]]
    read: Callable[[Path, str], None]
    honest: str
    needs: tuple[str, ...]
    share: int


KINDS = {
    "recipes": Kind(change_recipe, read_recipe, "recipe.yaml", ("recipe.yaml", "dense", "chat.jsonl"), 3),
    "rows": Kind(change_rows, read_rows, "chat.jsonl", tuple(f"{n}.jsonl" for n in ROWS), 4),
    "configs": Kind(change_checkpoint, read_checkpoint, "", ("recipe.yaml", "dense", "chat.jsonl"), 2),
    "packed": Kind(change_packed, read_packed, "gptq", PACKED, 2),
    "run": Kind(change_run, read_run, "", ("run", "dense", "chat.jsonl", "recipe.yaml"), 2),
}
