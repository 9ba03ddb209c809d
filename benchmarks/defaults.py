"""Defaults: the learning rates that `train.learning_rate: auto` takes, found and checked by this search.

    python benchmarks/defaults.py search                    # every method, grid, task and rate
    python benchmarks/defaults.py search --methods lr_qat --grids 2:64 --rates 1e-3 4e-3 --tasks docstrings
    python benchmarks/defaults.py table                     # what the rows say, beside adapters/rates.py
    python benchmarks/defaults.py third --model FOLDER      # make another model: a small Qwen3, on the text
    python benchmarks/defaults.py search --model FOLDER     # what the table is worth on it

Two tasks, because a rate must serve both: `text`, the kind of text the model knows (all that training can
do is win back what rounding lost), and `docstrings`, which is new to it (what a user comes for). One number
is minimised: the loss on held-out rows after --steps steps of --batch windows. A rate's regret is its loss
over the least loss of that model, method, grid and task. Everything but the rate is the recipe's default.

Rows are written to --out as they come, so a stopped search goes on.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, begin_step
from lowbit_ft.adapters.rates import rate_for
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.examples import load_examples
from lowbit_ft.data.windows import Examples
from lowbit_ft.evaluate.perplexity import evaluate
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_tokenizer
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.data import DataSection
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.train.loop import train

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
TASKS = {"text": ("text", "all"), "docstrings": ("chat", "assistant")}  # folder: (format, tokens with loss)
METHODS = ("lr_qat", "dl_qat", "l4q", "scale")
FACTS = (
    "model", "task", "method", "bits", "group_size", "symmetric", "calibrate", "learning_rate",
    "scale_learning_rate", "rank", "alpha", "steps", "batch", "seed", "note",
)  # fmt: skip


def loss_of(model: Any, valid: Any) -> float:
    found = evaluate(model, valid, "").loss
    assert found is not None, "a language model"
    return found


class Bed:
    """One checkpoint: its tasks as windows, its bases, and one training run on one of them."""

    def __init__(self, o: argparse.Namespace):
        self.o = o
        self.checkpoint = Checkpoint.open(o.model, dtype="float32")
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.bases: dict[str, Any] = {}
        self.data = {
            task: self.windows_of(task, self.tokenizer, o.window, o.valid_windows) for task in o.tasks
        }
        self.starts: dict[str, float] = {}

    @staticmethod
    def windows_of(
        task: str, tokenizer: Any, window: int, count: int
    ) -> tuple[Examples, list[dict[str, Any]]]:
        """Training windows, and batches of held-out ones."""
        kind, learned = TASKS[task]
        sources = {
            part: {"path": str(ASSETS / task / f"{part}.jsonl"), "format": kind}
            for part in ("train", "valid")
        }
        section = DataSection.model_validate({**sources, "sequence_len": window, "train_on": learned})
        assert section.valid is not None
        train = load_examples(section.train, section, tokenizer, seed=0)
        valid = Examples(load_examples(section.valid, section, tokenizer)[:count])
        batches = Batches(valid, 8, 0, seed=0, shuffle=False, mask_dtype=torch.float32)
        return train, list(batches.one_epoch())

    def base(self, quant: QuantSection, task: str) -> tuple[Any, str]:
        """A fresh packed model, calibrated on the rows of the task as a run is."""
        key = f"{task} {quant.model_dump_json()}"
        if key not in self.bases:
            found = Batches(self.data[task][0], 16, 0, seed=0, mask_dtype=torch.float32)
            text = [{k: v for k, v in next(found).items() if k != "labels"} for _ in range(8)]
            self.bases = {
                key: quantize(self.checkpoint, quant, dtype=torch.float32, calibration=lambda: text)[0]
            }
        return copy.deepcopy(self.bases[key]), key

    def run(self, fact: dict[str, Any]) -> dict[str, float]:
        """Train one row; {"start", "loss", "seconds"} of processor time."""
        quant = QuantSection.model_validate(
            {k: fact[k] for k in ("bits", "group_size", "symmetric", "calibrate")}
        )
        model, key = self.base(quant, fact["task"])
        train_rows, valid = self.data[fact["task"]]
        if key not in self.starts:
            self.starts[key] = loss_of(model, valid)
        torch.manual_seed(fact["seed"])
        fields = ADAPTERS[fact["method"]].model_fields
        options = {k: fact[k] for k in ("rank", "alpha") if fact[k] is not None and k in fields}
        attach(model, ADAPTERS[fact["method"]].model_validate({"method": fact["method"], **options}))
        section = TrainSection(
            max_steps=fact["steps"],
            micro_batch_size=fact["batch"],
            gradient_accumulation_steps=1,
            mixed_precision=self.o.precision,
            learning_rate=fact["learning_rate"],
            scale_learning_rate=fact["scale_learning_rate"],
            seed=fact["seed"],
        )
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = _trained(model, train_rows, section, folder)
        if result.stopped:
            raise SystemExit("stopped by a signal; rows that are done are kept")
        seconds = time.process_time() - began
        return {"start": self.starts[key], "loss": loss_of(model, valid), "seconds": seconds}


def _trained(model: Any, rows: Examples, section: TrainSection, folder: str) -> Any:
    batches = Batches(rows, section.micro_batch_size, 0, seed=section.seed, mask_dtype=torch.float32)
    return train(
        model, batches, None, section, folder,
        on_step=lambda step: begin_step(model, step), console=Console(quiet=True),
    )  # fmt: skip


def search(o: argparse.Namespace) -> None:
    """Every row that is not there yet: tasks outermost inside a grid, so that a base is made once."""
    bed, stored = Bed(o), read(o.out)
    done = {tuple(row[k] for k in FACTS) for row in stored}
    for grid in o.grids:
        bits, group, *asymmetric = grid.split(":")
        for task in o.tasks:
            for method in o.methods:
                for rate in o.rates:
                    fact = {
                        "model": Path(o.model).name, "task": task, "method": method, "bits": int(bits),
                        "group_size": int(group), "symmetric": not asymmetric, "calibrate": o.calibrate,
                        "learning_rate": rate, "scale_learning_rate": o.scale_rate, "rank": o.rank,
                        "alpha": o.alpha, "steps": o.steps, "batch": o.batch, "seed": o.seed, "note": o.note,
                    }  # fmt: skip
                    if tuple(fact[k] for k in FACTS) in done:
                        continue
                    row = fact | bed.run(fact)
                    assert math.isfinite(row["loss"])
                    stored.append(row)
                    write_text(o.out, json.dumps(stored, indent=1) + "\n")
                    print(
                        f"W{bits} g{group} {task} {method} rate {rate:g}: {row['start']:.4f} -> "
                        f"{row['loss']:.4f} ({row['seconds']:.0f} s)",
                        flush=True,
                    )


def table(o: argparse.Namespace) -> None:
    """Regrets by rate (Markdown), and what the rate of `auto` costs over the best one that was tried."""
    rows = read(o.out)
    rates = sorted({row["learning_rate"] for row in rows})
    print("| model | grid | method | task | " + " | ".join(f"{rate:g}" for rate in rates) + " | auto |")
    print("|---|---|---|---|" + "--:|" * (len(rates) + 1))
    keys = ("model", "bits", "group_size", "symmetric", "method", "task", "steps", "seed", "note")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        mine = {r["learning_rate"]: r["loss"] for r in rows if tuple(r[k] for k in keys) == key}
        best, auto = min(mine.values()), rate_for(key[4], key[1])[0]
        cells = [f"+{mine[rate] - best:.4f}" if rate in mine else "" for rate in rates]
        cost = f"{auto:g}: +{mine[auto] - best:.4f}" if auto in mine else f"{auto:g}: not tried"
        grid = f"W{key[1]} g{key[2]} {'sym' if key[3] else 'asym'}"
        print(f"| {key[0]} | {grid} | {key[4]} | {key[5]} | " + " | ".join([*cells, cost]) + " |")


def third(o: argparse.Namespace) -> None:
    """A Qwen3 of 4 layers trained for --steps steps on the bundled text, in --model."""
    folder = Path(o.model)
    if folder.exists():
        raise SystemExit(f"{folder} is there already; give --model another name, or search on it")
    checkpoint = Checkpoint.open(ASSETS / "tiny-llama", dtype="float32")
    tokenizer = load_tokenizer(checkpoint)
    torch.manual_seed(o.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=checkpoint.config.vocab_size,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    rows, _ = Bed.windows_of("text", tokenizer, o.window, o.valid_windows)
    batches = Batches(rows, o.batch, 0, seed=o.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=o.steps)
    for step in range(o.steps):
        ids = next(batches)["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.step()
        if step % 50 == 0 or step == o.steps - 1:
            print(f"step {step + 1}/{o.steps}: loss {loss.item():.4f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["search", "table", "third"])
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(ADAPTERS))
    p.add_argument("--grids", nargs="+", default=["4:128", "3:128", "2:64"], help="bits:group, and :asym")
    p.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3])
    p.add_argument("--scale-rate", type=float, default=None, help="scale_learning_rate; default: the rate")
    p.add_argument("--rank", type=int, default=None)
    p.add_argument("--alpha", type=float, default=None)
    p.add_argument("--calibrate", default="gptq")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--precision", default="bf16", choices=["bf16", "no"], help="of the products")
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--note", default="")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=HERE / "results" / "defaults.json")
    return p.parse_args()


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    {"search": search, "table": table, "third": third}[o.what](o)


if __name__ == "__main__":
    main()
