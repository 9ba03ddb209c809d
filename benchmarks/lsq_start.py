"""LSQ's start of static scales (2 mean |x| / sqrt(Q)) against the one of least error, for a detector.

    python -m benchmarks.lsq_start --work DIR --grids 4:8 3:8 --seeds 0

recipes/quickstart-object-detection.yaml with quant.activations.range lsq, mse and minmax, on --grid bits of
weights and of inputs, each for --steps steps; full precision, rounded and trained as its table has them. Rows
are kept in --out as they come (JSON), so a stopped run goes on.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from lowbit_ft import pipeline
from lowbit_ft.files.atomic import write_text
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rundir import environment

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "quickstart-object-detection.yaml"
KEY = ("range", "grid", "seed", "steps")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True, help="where the runs are made, one at a time")
    p.add_argument("--ranges", nargs="+", default=["lsq", "mse"])
    p.add_argument("--grids", nargs="+", default=["4:8", "3:8"], help="bits of weights : of inputs")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--steps", type=int, default=90)
    p.add_argument("--out", type=Path, default=HERE / "results" / "lsq_start.json")
    return p.parse_args()


def measured(work: Path, facts: dict[str, Any]) -> dict[str, Any]:
    weights, inputs = facts["grid"].split(":")
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    changes = {
        "quant.bits": weights,
        "quant.activations.bits": inputs,
        "quant.activations.range": facts["range"],
        "train.seed": facts["seed"],
        "train.max_steps": facts["steps"],
        "train.eval_every": "null",
        "train.keep_best": "false",
        "train.save_every": "null",
        "export.format": "native",
        "output": folder,
    }
    began = time.process_time()
    pipeline.run(load_recipe(RECIPE, [f"{key}={value}" for key, value in changes.items()]))
    table = json.loads((folder / "evaluation.json").read_text())["rows"]
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    rows = {row["stage"]: {"loss": row["loss"], **row["scores"]} for row in table}
    return {
        **facts,
        "first_loss": first["loss"],
        "stages": {name: rows[name] for name in ("base", "quantized", "trained")},
        "processor_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    o = options()
    kept = json.loads(o.out.read_text())["rows"] if o.out.exists() else []
    for seed in o.seeds:
        for grid in o.grids:
            for name in o.ranges:
                facts = {"range": name, "grid": grid, "seed": seed, "steps": o.steps}
                if any(all(row[key] == facts[key] for key in KEY) for row in kept):
                    continue
                kept.append(measured(o.work, facts))
                write_text(o.out, json.dumps({"environment": environment(), "rows": kept}, indent=1))
                print(json.dumps(kept[-1]))


if __name__ == "__main__":
    main()
