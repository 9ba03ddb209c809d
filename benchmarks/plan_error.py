"""What `lowbit-ft plan` predicts against bytes that were counted, for five shapes, with and without gradient
checkpointing.

    python -m benchmarks.plan_error                     # about three minutes on two cores
    python -m benchmarks.plan_error --shapes tiny,25m   # some of them

Counted is every storage that is alive at once (lowbit_ft/plan/counting.py) over three optimizer steps and an
evaluation:

    real   training as users run it (lowbit_ft.train.train) on a CPU, inside the packed ops too
    fake   the same model, loss, backward and optimizer on tensors without data, for shapes that take this
           machine too long; small shapes are counted both ways, and must agree
    cuda   on a GPU: torch.cuda.max_memory_allocated of real training, limit 8 %

The tiny shape is the quickstart's model on its own data. The prediction is that of `plan`, from config.json
and a recipe, without what the process holds beside tensors. More than --limit per cent of error in a total
fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.plan_counts import count_cuda, count_fake, count_real
from benchmarks.plan_shapes import ROOT, SHAPES, recipe_for
from lowbit_ft.plan.plan import Card, Plan, plan
from lowbit_ft.recipe.recipe import Recipe


def predicted(recipe: Recipe, masked: bool) -> tuple[Plan, dict[str, int]]:
    """The plan on a CPU, and its bytes by part without the process."""
    made = plan(recipe, Path(recipe.model.path), Card(1 << 50, "a CPU", 0), 1, packed_rows=masked)
    assert made is not None
    p = made.parts
    base = p["codes"] + p["residual"] + p["scales and zeros"]
    dense = p["embeddings"] + p["head"] + p["norms and other"]
    fixed = base + dense + p["adapters"] + p["optimizer states"]
    evaluation = made.stages["evaluation while training"] - p["context"]
    total = made.stages["training"] - p["context"]
    return made, {
        "packed base": base,
        "dense": dense,
        "adapters": p["adapters"],
        "optimizer": p["optimizer states"],
        "step": total - fixed,
        "evaluation": evaluation - fixed,
        "total": total,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default=",".join(SHAPES))
    p.add_argument("--limit", type=float, help="per cent of error of a total (default 5, on a GPU 8)")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_error.json")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    limit = o.limit or (8.0 if o.device == "cuda" else 5.0)
    rows, worst = [], 0.0
    names = ("packed base", "dense", "adapters", "optimizer", "step", "evaluation", "total")
    print(
        f"{'shape':<7}{'method':<13}{'ckpt':<6}{'counted':<9}"
        + "".join(f"{n:>24}" for n in names)
        + f"{'error':>9}   (MB: predicted / counted)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for shape in o.shapes.split(","):
            for checkpointing in (False, True):
                path = Path(folder) / shape
                recipe = recipe_for(shape, path, checkpointing)
                ways: dict[str, Callable[[], dict[str, int]]] = {
                    "real": lambda r=recipe, s=shape, f=path: count_real(r, s, f),
                    "fake": lambda r=recipe: count_fake(r, True),
                    "cuda": lambda r=recipe, s=shape, f=path: count_cuda(r, s, f),
                }
                _, guess = predicted(recipe, True)
                for way in ("cuda",) if o.device == "cuda" else SHAPES[shape][2]:
                    began = time.perf_counter()
                    with nullcontext():
                        found = ways[way]()
                    error = 100 * (guess["total"] / found["total"] - 1)
                    worst = max(worst, abs(error))
                    rows.append(
                        {
                            "shape": shape,
                            "method": recipe.adapter.method,
                            "checkpointing": checkpointing,
                            "counted_by": way,
                            "predicted": guess,
                            "counted": found,
                            "error_percent": error,
                            "seconds": time.perf_counter() - began,
                        }
                    )
                    cells = "".join(
                        f"{guess.get(n, 0) / 1e6:>13.3f} /{found.get(n, 0) / 1e6:>9.3f}" for n in names
                    )
                    start = (
                        f"{shape:<7}{recipe.adapter.method:<13}{'yes' if checkpointing else 'no':<6}{way:<9}"
                    )
                    print(f"{start}{cells}{error:>8.2f}%", flush=True)
                    o.out.parent.mkdir(parents=True, exist_ok=True)
                    o.out.write_text(
                        json.dumps(
                            {
                                "device": o.device,
                                "torch": torch.__version__,
                                "limit_percent": limit,
                                "rows": rows,
                            },
                            indent=1,
                        )
                        + "\n"
                    )
    print(f"largest error of a total: {worst:.2f} %")
    if worst > limit:
        raise SystemExit(f"plan is {worst:.2f} % off, and the limit is {limit} %")


if __name__ == "__main__":
    main()
