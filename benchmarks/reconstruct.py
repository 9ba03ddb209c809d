"""A block-wise start against more steps of distillation, for the same processor time.

    python benchmarks/reconstruct.py                        every arm, start, grid and seed
    python benchmarks/reconstruct.py --grids 2:64 --starts gptq --seeds 0 --kl-steps 9 --steps 9 --samples 16

Every arm starts from the same packed base and is trained on the same text windows; the teacher of the KL is
the full-precision model itself, in memory. Arms, in this order, because the second is given the time of the
first:

    fit+kl   train.reconstruct (--steps a layer), then --kl-steps of KL
    kl       KL alone, for as many steps as the processor seconds of fit+kl allow
    fit      train.reconstruct alone
    start    nothing

Seconds are processor seconds of this process with one thread, the base's calibration beside them. Rows are
kept in --out as they come (JSON), so a stopped run goes on; the table is printed from that file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from quality import ASSETS, HERE, Bench
from rich.console import Console

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, begin_step
from lowbit_ft.adapters.rates import rate_for
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Examples
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.load import load_model
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.reconstruct import ReconstructSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.rundir import environment
from lowbit_ft.signals import SIGNALS, Lesson, OtherModel
from lowbit_ft.train.loop import train
from lowbit_ft.train.reconstruct import reconstruct

ARMS = ("fit+kl", "kl", "fit", "start")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--train", default=str(ASSETS / "text" / "train.jsonl"), help='jsonl of {"text": ...}')
    p.add_argument("--valid", default=str(ASSETS / "text" / "valid.jsonl"))
    p.add_argument("--method", default="lr_qat", choices=[m for m, c in ADAPTERS.items() if c.exact_merge])
    p.add_argument("--grids", nargs="+", default=["3:128", "2:64"], help="bits:group_size, symmetric")
    p.add_argument("--starts", nargs="+", default=["mse", "gptq", "signround"])
    p.add_argument("--inputs", default=ReconstructSection().inputs)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=120, help="of reconstruct, in every layer")
    p.add_argument("--samples", type=int, default=128, help="windows of reconstruct, and of signround")
    p.add_argument("--signround-steps", type=int, default=200)
    p.add_argument("--kl-steps", type=int, default=120)
    p.add_argument("--batch", type=int, default=8, help="windows per step")
    p.add_argument("--precision", default="bf16", choices=["bf16", "no"], help="of the products")
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=240)
    p.add_argument("--learning-rate", type=float, default=None, help="of the KL; default: as auto takes it")
    p.add_argument("--out", type=Path, default=HERE / "results" / "reconstruct.json")
    return p.parse_args()


class Race(Bench):
    """Bench with a teacher, and the arms."""

    def __init__(self, o: argparse.Namespace):
        super().__init__(o)
        self.teacher = load_model(self.checkpoint, dtype=torch.float32)
        self.packing: dict[str, float] = {}  # settings of a base -> its processor seconds

    def text(self, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        batches = Batches(Examples(self.train), self.o.batch, 0, seed=seed)
        count = max(1, self.o.samples // self.o.batch)
        return [{"input_ids": next(batches)["input_ids"]} for _ in range(count)]

    def packed(self, start: str, bits: int, group: int) -> tuple[Any, float]:
        """A fresh packed model, and what its calibration took."""
        quant = QuantSection.model_validate(
            {
                "bits": bits,
                "group_size": group,
                "calibrate": start,
                "calibration": {"steps": self.o.signround_steps},
            }
        )
        key = quant.model_dump_json()
        if key not in self.packing:
            began = time.process_time()
            self.bases[key] = quantize(self.checkpoint, quant, dtype=torch.float32, calibration=self.text)[0]
            self.packing[key] = time.process_time() - began
        return self.base(quant), self.packing[key]

    def fit(self, model: Any, bits: int, seed: int) -> list[float]:
        """train.reconstruct; the loss of every layer after it."""
        rate = rate_for(self.o.method, bits)[0]
        section = ReconstructSection.model_validate(
            {"steps": self.o.steps, "inputs": self.o.inputs, "learning_rate": rate}
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=self.o.precision == "bf16"):
            fits = reconstruct(
                model,
                self.checkpoint,
                self.text(seed),
                section,
                seed=seed,
                device=torch.device("cpu"),
                dtype=torch.float32,
            )
        return [fit.after for fit, _ in fits]

    def distil(self, model: Any, bits: int, steps: int, seed: int) -> None:
        """KL to the full-precision model on every position."""
        section = TrainSection.model_validate(
            {
                "max_steps": steps,
                "micro_batch_size": self.o.batch,
                "gradient_accumulation_steps": 1,
                "mixed_precision": self.o.precision,
                "learning_rate": self.o.learning_rate or rate_for(self.o.method, bits)[0],
                "signal": {"kind": "logits"},
                "teacher": self.o.model,
                "seed": seed,
            }
        )
        teacher = OtherModel(self.teacher, {"teacher": "full precision"})
        lesson = Lesson(SIGNALS["logits"], section.signal, teacher)
        with tempfile.TemporaryDirectory() as folder:
            train(
                model,
                Batches(Examples(self.train), self.o.batch, 0, seed=seed),
                None,
                section,
                folder,
                on_step=lambda step: begin_step(model, step),
                lesson=lesson,
                console=Console(quiet=True),
            )

    def arm(self, arm: str, start: str, bits: int, group: int, seed: int, before: dict[str, Any]) -> Any:
        """One row. before: the row of fit+kl."""
        model, packing = self.packed(start, bits, group)
        torch.manual_seed(seed)
        attach(model, ADAPTERS[self.o.method].model_validate({"method": self.o.method}))
        row: dict[str, Any] = {"packing_s": packing, "kl_steps": 0}
        began = time.process_time()
        if "fit" in arm:
            row["layers"] = self.fit(model, bits, seed)
        row["fit_s"] = time.process_time() - began
        if "kl" in arm:
            row["kl_steps"] = self.o.kl_steps
            if arm == "kl":
                a_step = before["kl_s"] / before["kl_steps"]
                row["kl_steps"] += round(before["fit_s"] / a_step)
            began = time.process_time()
            self.distil(model, bits, row["kl_steps"], seed)
            row["kl_s"] = time.process_time() - began
        return row | {"perplexity": self.perplexity(model)}


def main() -> None:
    o = options()
    torch.set_num_threads(1)
    race = Race(o)
    keys = ("method", "inputs", "steps", "samples", "signround_steps", "batch", "window", "learning_rate")
    settings = {key: getattr(o, key) for key in (*keys, "valid_windows")} | {"asked_kl_steps": o.kl_steps}
    rows: list[dict[str, Any]] = json.loads(o.out.read_text())["rows"] if o.out.is_file() else []

    def found(where: dict[str, Any]) -> dict[str, Any] | None:
        return next((row for row in rows if all(row.get(k) == v for k, v in where.items())), None)

    for spec in o.grids:
        bits, group = map(int, spec.split(":"))
        for start in o.starts:
            for seed in o.seeds:
                place = {"grid": spec, "start": start, "seed": seed, **settings}
                for arm in ARMS:
                    if found({**place, "arm": arm}) is None:
                        before = found({**place, "arm": ARMS[0]}) or {}
                        row = race.arm(arm, start, bits, group, seed, before)
                        rows.append({**place, "arm": arm, **row})
                        o.out.parent.mkdir(parents=True, exist_ok=True)
                        write_text(
                            o.out, json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n"
                        )
                        print(f"{spec} {start} seed {seed} {arm}: {row['perplexity']:.4f}", flush=True)
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, spread where there are several, KL steps and processor seconds after the start."""
    lines = [
        "| grid | start | arm | perplexity | KL steps | seconds |",
        "| --- | --- | --- | --: | --: | --: |",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["grid"], row["start"], row["arm"]), []).append(row)
    for (grid, start, arm), some in groups.items():
        values = [row["perplexity"] for row in some]
        spread = f" ± {pstdev(values):.3f}" if len(values) > 1 else ""
        seconds = mean(row["fit_s"] + row.get("kl_s", 0.0) for row in some)
        steps = mean(row["kl_steps"] for row in some)
        lines.append(
            f"| {grid} | {start} | {arm} | {mean(values):.3f}{spread} | {steps:.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
