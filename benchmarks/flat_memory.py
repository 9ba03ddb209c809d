"""Memory over a run with many evaluations and checkpoints: after the 50th evaluation it must be what it was
after the first ones.

    python benchmarks/flat_memory.py                 # 50 evaluations, 10 checkpoints, on a CPU

Trains the small Llama of the repository, evaluates after every step and saves after every fifth, and reads
the resident set of the process before every step. Printed: the line fitted through the readings after the
first few (which fill the allocator's pools and make the optimizer's states), as its rise over the whole run
in per cent of the mean. More than --limit fails.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import linear_regression, mean

import psutil
import torch
from rich.console import Console

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.train.loop import train
from lowbit_ft.train.memory import release_freed

ASSETS = Path(__file__).resolve().parent.parent / "recipes" / "assets"


def windows(count: int, length: int, vocabulary: int) -> Examples:
    """Random tokens; every one but the first of a window is a target."""
    ids = torch.randint(0, vocabulary, (count, length)).tolist()
    return Examples([Example(row, row, [length]) for row in ids])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--method", default="lr_qat")
    p.add_argument("--evals", type=int, default=50)
    p.add_argument("--checkpoints", type=int, default=10)
    p.add_argument("--window", type=int, default=64)
    p.add_argument("--skip", type=int, default=5, help="readings that are warm-up")
    p.add_argument("--limit", type=float, default=1.0, help="per cent")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    checkpoint = Checkpoint.open(o.model, dtype="float32")
    model, _ = quantize(checkpoint, QuantSection(calibrate="absmax"), dtype=torch.float32)
    attach(model, ADAPTERS[o.method].model_validate({"method": o.method}))
    vocabulary = checkpoint.config.vocab_size
    batches = Batches(windows(8, o.window, vocabulary), 1, 0, 0)
    valid = Batches(windows(2, o.window, vocabulary), 1, 0, 1)
    section = TrainSection(
        max_steps=o.evals,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        eval_every=1,
        save_every=max(1, o.evals // o.checkpoints),
        gradient_checkpointing=True,
    )
    process, readings = psutil.Process(), []

    def read(_: int) -> None:
        release_freed()  # what was freed and not yet given back is not held by anything
        readings.append(process.memory_info().rss)

    with tempfile.TemporaryDirectory() as folder:
        train(model, batches, valid, section, folder, on_step=read, console=Console(quiet=True))
        saved = len(range(section.save_every or 1, o.evals + 1, section.save_every or 1))
    kept = readings[o.skip :]
    slope = linear_regression(range(len(kept)), kept).slope
    row = {
        "evals": o.evals,
        "checkpoints": saved,
        "mean_gb": mean(kept) / 1e9,
        "first_gb": kept[0] / 1e9,
        "last_gb": kept[-1] / 1e9,
        "rise_percent": 100 * slope * len(kept) / mean(kept),
    }
    for name, value in row.items():
        print(f"{name:<14}{value:10.3f}")
    if o.out:
        o.out.write_text(json.dumps(row | {"readings": readings}, indent=1) + "\n")
    if row["rise_percent"] > o.limit:
        raise SystemExit(
            f"memory rose by {row['rise_percent']:.2f} % over the run, and the limit is {o.limit} %"
        )


if __name__ == "__main__":
    main()
