"""The teacher table: how near each teacher is to full precision, and the perplexity of a student trained on
it.

    python benchmarks/teachers.py                                  # all of it, resumable
    python benchmarks/teachers.py --grids 2:64 --starts gptq --learners residual full --seeds 0 --steps 20

Students are lr_qat on plain text, the windows of quality.py, from each start (calibrator):

    labels       the tokens                      labels2      the same for twice the steps: the control
    residual     codes + residual of the base    checkpoint   the dense model packed to 8 bits
    full         the dense model itself          top64        its 64 most likely tokens and the rest's mass
    (what
                                                              train.teacher: cached keeps)
    mix          half labels, half residual      mix_full     half labels, half the dense model

Start gptq_original is gptq's codes with the residual of the original weight (clamped to half a step) in the
place of that of the compensated one: whether a student learns as well from it, so that one wide plane could
serve both. KL is to the dense model, per token of the validation windows; of the student as it starts, and
of the teacher. Rows are kept in --out as they come."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lowbit_kernels as kernels
import torch
from quality import ASSETS, Bench
from rich.console import Console

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, begin_step, packed_layers
from lowbit_ft.adapters.rates import rate_for
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Examples
from lowbit_ft.evaluate.perplexity import evaluate
from lowbit_ft.files.atomic import write_text
from lowbit_ft.grid import PackedWeight
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.load import load_model
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.rundir import environment
from lowbit_ft.signals import SIGNALS, Lesson, OtherModel, Teacher
from lowbit_ft.signals.residual import Residual
from lowbit_ft.train.loop import train

# learner -> (train.signal, who is asked, times the steps)
LEARNERS: dict[str, tuple[dict[str, Any], str | None, int]] = {
    "labels": ({"kind": "labels"}, None, 1),
    "labels2": ({"kind": "labels"}, None, 2),
    "residual": ({"kind": "logits"}, "residual", 1),
    "checkpoint": ({"kind": "logits"}, "checkpoint", 1),
    "full": ({"kind": "logits"}, "full", 1),
    "top64": ({"kind": "logits", "top_k": 64}, "full", 1),
    "mix": ({"kind": "mix"}, "residual", 1),
    "mix_full": ({"kind": "mix"}, "full", 1),
}
STARTS = ("mse", "gptq", "gptq_original")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--train", default=str(ASSETS / "text" / "train.jsonl"), help='jsonl of {"text": ...}')
    p.add_argument("--valid", default=str(ASSETS / "text" / "valid.jsonl"))
    p.add_argument("--grids", nargs="+", default=["4:128", "3:128", "2:64"], help="bits:group_size")
    p.add_argument("--asymmetric", action="store_true")
    p.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    p.add_argument("--learners", nargs="+", default=list(LEARNERS), choices=list(LEARNERS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--precision", default="bf16", choices=["bf16", "no"], help="of the products")
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=96)
    p.add_argument("--learning-rate", type=float, help="default: what auto takes at these bits")
    p.add_argument("--on", default="all", choices=["all", "targets"])
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "teachers.json")
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


class Table(Bench):
    """The checkpoint, its windows, the dense model and the one of 8 bits."""

    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__(o)
        self.dense = load_model(self.checkpoint, dtype=torch.float32).eval()
        rows = QuantSection(bits=8, group_size=-1, calibrate="absmax", residual_bits=0)
        self.eight = quantize(self.checkpoint, rows, dtype=torch.float32)[0]

    def student(self, bits: int, group: int, start: str) -> Any:
        """A fresh packed model from a start."""
        quant = QuantSection.model_validate(
            {
                "bits": bits,
                "group_size": group,
                "symmetric": not self.o.asymmetric,
                "calibrate": start.partition("_")[0],
            }
        )
        model = self.base(quant)
        if start == "gptq_original":
            for name, layer in list(packed_layers(model)):
                assert isinstance(layer.base, PackedWeight)
                weight = self.checkpoint.matrix(name, dtype=torch.float32)
                model.set_submodule(name, PackedLinear(with_residual_of(layer.base, weight), layer.bias))
        return model

    def teacher(self, name: str | None, model: Any) -> Teacher | None:
        if name is None:
            return None
        if name == "residual":
            return Residual(model)
        return OtherModel(self.dense if name == "full" else self.eight, {"teacher": name})

    def kl(self, model: Any, within: Any = None) -> float:
        with within or nullcontext():
            row = evaluate(model, self.valid, "", self.reference)
        assert row.kl is not None
        return row.kl

    def rate(self, bits: int) -> float:
        return self.o.learning_rate or rate_for("lr_qat", bits)[0]

    def train_one(self, bits: int, group: int, start: str, learner: str, seed: int) -> dict[str, Any]:
        signal, asked, times = LEARNERS[learner]
        model = self.student(bits, group, start)
        row: dict[str, Any] = {"start_kl": self.kl(model)}
        torch.manual_seed(seed)
        attach(model, ADAPTERS["lr_qat"].model_validate({"method": "lr_qat"}))
        teacher = self.teacher(asked, model)
        if teacher is not None and (other := teacher.model()) is not None:
            row["teacher_kl"] = self.kl(*other)
        if asked is not None:
            signal = {**signal, "on": self.o.on}
        section = TrainSection(
            max_steps=self.o.steps * times,
            micro_batch_size=self.o.batch,
            gradient_accumulation_steps=1,
            mixed_precision=self.o.precision,
            learning_rate=self.rate(bits),
            seed=seed,
            signal=signal,  # pyright: ignore[reportArgumentType]
        )
        began, busy = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = train(
                model,
                Batches(Examples(self.train), self.o.batch, 0, seed=seed, taught=True),
                None,
                section,
                folder,
                lesson=Lesson(SIGNALS[signal["kind"]], section.signal, teacher),
                on_step=lambda step: begin_step(model, step),
                console=Console(quiet=True),
            )
        if result.stopped:
            raise SystemExit("stopped by a signal; rows that are done are kept")
        row |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
        trained = evaluate(model, self.valid, "", self.reference)
        return row | {"perplexity": trained.perplexity, "kl": trained.kl}


def with_residual_of(base: PackedWeight, weight: torch.Tensor) -> PackedWeight:
    """The codes of `base` with the residual of another weight [N, K] against them, clamped to half a step."""
    grid, k = base.grid, base.shape[1]
    size = k if grid.group_size == -1 else grid.group_size
    step = base.scale.t().float().repeat_interleave(size, dim=1)[:, :k]
    off = ((weight - base.dequantize()) / step + 0.5) * (1 << grid.residual_bits)
    fraction = off.floor().clamp(0, (1 << grid.residual_bits) - 1).to(torch.uint8)
    return replace(base, residual=kernels.pack(fraction, grid.residual_bits))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("bits", "group_size", "symmetric", "start", "learner", "seed", "steps", "on", "learning_rate")
    return tuple(row[key] for key in keys)


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| grid | start | learner | KL start | KL teacher | perplexity by seed | KL trained | CPU s |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["group_size"], row["start"], row["learner"]), []).append(row)
    for (bits, group, start, learner), same in groups.items():
        mean = {k: sum(r[k] for r in same) / len(same) for k in ("kl", "cpu_seconds", "start_kl")}
        teacher = f"{same[0]['teacher_kl']:.4f}" if "teacher_kl" in same[0] else ""
        values = ", ".join(f"{row['perplexity']:.3f}" for row in same)
        print(
            f"| W{bits} g{group} | {start} | {learner} | {mean['start_kl']:.4f} | {teacher} | {values} | "
            f"{mean['kl']:.4f} | {mean['cpu_seconds']:.0f} |"
        )


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    table = Table(o)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.get("rows", [])
    stored |= {"full_precision": table.reference.row().perplexity, "environment": environment()}
    done = {key_of(row) for row in rows}
    for seed in o.seeds:
        for grid in o.grids:
            bits, group = (int(value) for value in grid.split(":"))
            for start in o.starts:
                for learner in o.learners:
                    fact = {
                        "bits": bits,
                        "group_size": group,
                        "symmetric": not o.asymmetric,
                        "start": start,
                        "learner": learner,
                        "seed": seed,
                        "steps": o.steps,
                        "on": o.on,
                        "learning_rate": table.rate(bits),
                    }
                    if key_of(fact) in done:
                        continue
                    row = fact | table.train_one(bits, group, start, learner, seed)
                    rows.append(row)
                    write_text(o.out, json.dumps(stored | {"rows": rows}, indent=1) + "\n")
                    print(f"{grid} {start} {learner} seed {seed}: {row['perplexity']:.3f}", flush=True)
    print(f"\nfull precision {stored['full_precision']:.3f}\n")
    print_table(rows)


if __name__ == "__main__":
    main()
