"""How a gradient is made, measured: perplexity at equal tokens, and the time and memory of a step.

    python benchmarks/gradients.py                            # quality, W2 g64 on the tiny Llama; resumable
    python benchmarks/gradients.py --cases backprop cage --seeds 0 --steps 20
    python benchmarks/gradients.py --times --rounds 8         # step times, interleaved, and peak memory

Quality: from one start (gptq), on the windows of quality.py; `steps` of a case are those of --steps times
its factor, so that rows of one length in tokens, in time or in forwards can be set side by side:

    backprop       lr_qat as it trains by default     backprop_1.2   as long as fogzo takes
    cage           the same, pulled by 0.1 in all     cage_1         by 1
    cage_coupled   in the gradient                    fogzo          backprop for 70 %, then fogzo
    zeroth_order   as many forwards as backprop has   zeroth_long    ten times as many
    qzo            scales alone, by zeroth order      scale          scales alone, by backprop
    full           full_qat, by backprop              full_cage      pulled by 1 in all; full_cage_4: by 4
    full_fogzo     30 % of its steps by fogzo         ef             ef_qat, a tenth of the rows
    full_cage_0.1, full_cage_0.02: weaker pulls       full_cage_early: by 0.02 from the first step
    ef_5, ef_10, ef_25: share of rows, at 8e-3
    full_bf16      full_qat with masters in bf16      full_none      with none (ECO); scales at 4e-3

Rows are kept in --out as they come."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import torch
from loss_memory import allocator_peak
from quality import ASSETS, HERE, Bench, Setting
from rich.console import Console

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, begin_step
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Examples
from lowbit_ft.evaluate.perplexity import Reference
from lowbit_ft.files.atomic import write_text
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.rotations import FoldedCheckpoint, Rotation
from lowbit_ft.rundir import environment
from lowbit_ft.train.loop import train

ZEROTH: dict[str, Any] = {"gradient": {"kind": "zeroth_order"}}
# case -> (method, times the steps, of the train section; and of the adapter, under that name)
CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "backprop": ("lr_qat", 1, {}),
    "backprop_1.2": ("lr_qat", 1.2, {}),
    "cage": ("lr_qat", 1, {"gradient": {"cage": {"lambda": 0.1}}}),
    "cage_1": ("lr_qat", 1, {"gradient": {"cage": {"lambda": 1.0}}}),
    "cage_coupled": (
        "lr_qat",
        1,
        {"gradient": {"cage": {"lambda": 1e-6, "unit": "raw", "form": "coupled"}}},
    ),
    "fogzo": ("lr_qat", 1, {"gradient": {"kind": "fogzo"}}),
    "zeroth_order": ("lr_qat", 1.5, ZEROTH),
    "zeroth_long": ("lr_qat", 15, ZEROTH),
    "qzo": ("scale", 1.5, ZEROTH),
    "scale": ("scale", 1, {}),
    "full": ("full_qat", 1, {}),
    "full_cage": ("full_qat", 1, {"gradient": {"cage": {"lambda": 1.0}}}),
    "full_cage_4": ("full_qat", 1, {"gradient": {"cage": {"lambda": 4.0}}}),
    "full_cage_0.02": ("full_qat", 1, {"gradient": {"cage": {"lambda": 0.02}}}),
    "full_cage_early": ("full_qat", 1, {"gradient": {"cage": {"lambda": 0.02, "silence": 0.0}}}),
    "full_cage_0.1": ("full_qat", 1, {"gradient": {"cage": {"lambda": 0.1}}}),
    "full_fogzo": ("full_qat", 1, {"gradient": {"kind": "fogzo"}}),
    "ef": ("ef_qat", 1, {}),
    "ef_5": ("ef_qat", 1, {"learning_rate": 8e-3, "adapter": {"share": 0.05}}),
    "ef_10": ("ef_qat", 1, {"learning_rate": 8e-3, "adapter": {"share": 0.1}}),
    "ef_25": ("ef_qat", 1, {"learning_rate": 8e-3, "adapter": {"share": 0.25}}),
    "full_bf16": ("full_qat", 1, {"adapter": {"master": "bf16"}}),
    "full_none": ("full_qat", 1, {"adapter": {"master": "none"}, "scale_learning_rate": 4e-3}),
}
# --times: a step in which each is at work
AT_WORK: dict[str, tuple[str, dict[str, Any]]] = {
    "backprop": ("lr_qat", {}),
    "cage": ("lr_qat", {"gradient": {"cage": {"lambda": 0.5, "silence": 0.0, "schedule": "constant"}}}),
    "cage_coupled": (
        "lr_qat",
        {"gradient": {"cage": {"lambda": 1e-6, "unit": "raw", "form": "coupled", "silence": 0.0}}},
    ),
    "fogzo": ("lr_qat", {"gradient": {"kind": "fogzo", "start": 0.0}}),
    "zeroth_order": ("lr_qat", ZEROTH),
    "qzo": ("scale", ZEROTH),
    "full": ("full_qat", {}),
    "full_fogzo": ("full_qat", {"gradient": {"kind": "fogzo", "start": 0.0}}),
    "ef_5": ("ef_qat", {"adapter": {"share": 0.05}}),
    "ef_10": ("ef_qat", {"adapter": {"share": 0.1}}),
    "ef_25": ("ef_qat", {"adapter": {"share": 0.25}}),
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--train", default=str(ASSETS / "text" / "train.jsonl"), help='jsonl of {"text": ...}')
    p.add_argument("--valid", default=str(ASSETS / "text" / "valid.jsonl"))
    p.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    p.add_argument("--grid", default="2:64", help="bits:group[:inputs[:cache]]")
    p.add_argument("--start", default="gptq", help="calibrator")
    p.add_argument("--rotate", action="store_true", help="by Hadamard matrices, r1, r2 and r4")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=96)
    p.add_argument("--learning-rate", type=float, default=4e-3)
    p.add_argument("--zeroth-learning-rate", type=float, default=1e-4)
    p.add_argument("--eps", type=float, default=0.05)
    p.add_argument("--targets", nargs="*", default=None, help="layers that train, for example '*.q_proj'")
    p.add_argument("--probes", type=int, default=1, help="directions per step of zeroth order")
    p.add_argument("--times", action="store_true", help="step times and memory instead of quality")
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--out", type=Path, default=HERE / "results" / "gradients.json")
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args()


class Table(Bench):
    """The checkpoint and its windows, and a run of a case."""

    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__(o)
        if o.rotate:
            every = (True,) * self.checkpoint.config.num_hidden_layers
            self.checkpoint = FoldedCheckpoint(self.checkpoint, Rotation(r1=True, r2=every, r4=every))

    def student(self, method: str, seed: int, **keys: Any) -> Any:
        """A fresh packed model with fresh adapters."""
        setting = Setting.of(self.o.grid, symmetric=True)
        quant = {"bits": setting.bits, "group_size": setting.group, "calibrate": self.o.start}
        model = self.base(QuantSection.model_validate(quant))
        setting.place(model)
        torch.manual_seed(seed)
        attach(model, ADAPTERS[method].model_validate({"method": method, "targets": self.o.targets} | keys))
        return model

    def section(self, steps: int, seed: int, changes: dict[str, Any]) -> TrainSection:
        changes = {key: value for key, value in changes.items() if key != "adapter"}
        gradient = dict(changes.get("gradient", {}))
        zeroth = gradient.get("kind") == "zeroth_order"
        if zeroth:
            gradient |= {"eps": self.o.eps, "probes": self.o.probes}
        return TrainSection.model_validate(
            {
                "max_steps": steps,
                "micro_batch_size": self.o.batch,
                "gradient_accumulation_steps": 1,
                "learning_rate": self.o.zeroth_learning_rate if zeroth else self.o.learning_rate,
                "seed": seed,
                **changes,
                "gradient": gradient,
            }
        )

    def quality(self, case: str, seed: int) -> dict[str, Any]:
        method, times, changes = CASES[case]
        changes = dict(changes)
        model = self.student(method, seed, **changes.pop("adapter", {}))
        started = self.perplexity(model)
        section = self.section(round(self.o.steps * times), seed, changes)
        began, busy = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = self.fit(model, section, folder)
            lines = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        every = max(1, len(losses) // 20)
        return {
            "start": started,
            "perplexity": self.perplexity(model),
            "steps_done": result.steps,
            "tokens": result.tokens,
            "losses": [round(mean(losses[i : i + every]), 4) for i in range(0, len(losses), every)],
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - busy,
        }

    def step_times(self, rounds: int) -> dict[str, Any]:
        """Median seconds of a step of each case (CPU time of the process), interleaved; peak bytes of one."""
        models = {
            case: self.student(method, 0, **changes.get("adapter", {}))
            for case, (method, changes) in AT_WORK.items()
        }
        seconds: dict[str, list[float]] = {case: [] for case in AT_WORK}
        peaks: dict[str, int] = {}
        for number in range(rounds + 1):
            for case, (_, changes) in AT_WORK.items():
                section = self.section(3, number, {"scheduler": "constant", **changes})
                marks: list[float] = []
                with tempfile.TemporaryDirectory() as folder:
                    self.stamped(models[case], section, folder, marks)
                    if number:
                        seconds[case] += [b - a for a, b in zip(marks, marks[1:], strict=False)]
                    else:
                        with tempfile.TemporaryDirectory() as other:
                            peaks[case] = self.peak(models[case], section, other)
            print(f"round {number} of {rounds}", flush=True)
        usual = median(seconds["backprop"])
        return {
            case: {"seconds": median(s), "times_backprop": median(s) / usual, "peak_bytes": peaks[case]}
            for case, s in seconds.items()
        }

    def stamped(self, model: Any, section: TrainSection, folder: str, marks: list[float]) -> None:
        """Train, with the CPU time at the beginning of each step."""
        train(
            model,
            Batches(Examples(self.train), self.o.batch, 0, seed=section.seed),
            None,
            section,
            folder,
            on_step=lambda step: (begin_step(model, step), marks.append(time.process_time()))[0],
            console=Console(quiet=True),
        )

    def peak(self, model: Any, section: TrainSection, folder: str) -> int:
        """Bytes above what was there before, at most, in a run of three steps."""
        return allocator_peak(lambda: self.stamped(model, section, folder, []))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    named = (
        "case",
        "grid",
        "start_calibrator",
        "seed",
        "steps",
        "batch",
        "eps",
        "probes",
        "targets",
        "rates",
    )
    return (*(row.get(k) for k in named), row.get("rotate", False))


def print_table(stored: dict[str, Any]) -> None:
    rows = stored.get("rows", [])
    if rows:
        print(f"full precision {stored['full_precision']:.3f}\n")
        print("| case | steps | start | perplexity | CPU s |")
        print("|---|--:|--:|--:|--:|")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(
            (
                row["case"],
                row["steps_done"],
                row["eps"],
                row.get("probes"),
                row.get("targets"),
                row["rates"],
                row.get("rotate", False),
            ),
            [],
        ).append(row)
    for (case, steps, *_), same in groups.items():
        values = [row["perplexity"] for row in same]
        spread = f" ±{pstdev(values):.3f}" if len(values) > 1 else ""
        print(
            f"| {case} | {steps} | {mean(r['start'] for r in same):.3f} | {mean(values):.3f}{spread} | "
            f"{mean(r['cpu_seconds'] for r in same):.0f} |"
        )
    if times := stored.get("times"):
        print("\n| step of | CPU s | times backprop | peak MB above the model |\n|---|--:|--:|--:|")
        for case, row in times.items():
            print(
                f"| {case} | {row['seconds']:.3f} | {row['times_backprop']:.2f} | "
                f"{row['peak_bytes'] / 1e6:.1f} |"
            )


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    table = Table(o)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.setdefault("rows", [])
    stored["environment"] = environment()
    if o.times:
        stored["times"] = table.step_times(o.rounds)
        write_text(o.out, json.dumps(stored, indent=1) + "\n")
    elif "full_precision" not in stored:
        device, dtype = torch.device("cpu"), torch.float32
        reference = Reference(table.checkpoint, table.valid, attention="sdpa", device=device, dtype=dtype)
        stored["full_precision"] = reference.row().perplexity
    done = {key_of(row) for row in rows}
    for seed in () if o.times else o.seeds:
        for case in o.cases:
            fact = {"case": case, "grid": o.grid, "start_calibrator": o.start, "seed": seed}
            fact |= {
                "steps": o.steps,
                "batch": o.batch,
                "eps": o.eps,
                "probes": o.probes,
                "targets": " ".join(o.targets or []),
                "rates": f"{o.learning_rate:g}, {o.zeroth_learning_rate:g}",
            }
            fact |= {"rotate": True} if o.rotate else {}
            if key_of(fact) in done:
                continue
            rows.append(fact | table.quality(case, seed))
            write_text(o.out, json.dumps(stored, indent=1) + "\n")
            print(f"{case} seed {seed}: {rows[-1]['perplexity']:.3f}", flush=True)
    print_table(stored)


if __name__ == "__main__":
    main()
