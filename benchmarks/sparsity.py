"""What zeros cost and what they save: W4 g128 of the tiny Llama with half of its weights at zero.

    python benchmarks/sparsity.py                             # every kind and pattern; resumable
    python benchmarks/sparsity.py --cases none magnitude --steps 20

Each kind of quant.sparsity prunes once, from the same text, and its zeros are locked: perplexity as it is
packed, and after `steps` of lr_qat; the bytes of the packed layers as compressed-tensors holds them, and what
zstd (level 19) makes of these bytes. No server here runs faster for zeros: the size is all that they save.

Rows are kept in --out as they come."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import torch
from quality import ASSETS, HERE, Bench

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.export import EXPORTERS
from lowbit_ft.files.atomic import write_text
from lowbit_ft.grid import PackedWeight, Weight
from lowbit_ft.merge import merged_weights
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.rundir import environment

KINDS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "magnitude": {"kind": "magnitude"},
    "wanda": {"kind": "wanda"},
    "sparsegpt": {"kind": "sparsegpt"},
    "magnitude_2:4": {"kind": "magnitude", "pattern": "2:4"},
    "wanda_2:4": {"kind": "wanda", "pattern": "2:4"},
    "sparsegpt_2:4": {"kind": "sparsegpt", "pattern": "2:4"},
}
LEVEL = 19  # of zstd: the most that its usual settings do


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--train", default=str(ASSETS / "text" / "train.jsonl"), help='jsonl of {"text": ...}')
    p.add_argument("--valid", default=str(ASSETS / "text" / "valid.jsonl"))
    p.add_argument("--cases", nargs="+", default=list(KINDS), choices=list(KINDS))
    p.add_argument("--start", nargs="+", default=["gptq"], help="calibrators")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=96)
    p.add_argument("--learning-rate", type=float, default=4e-3)
    p.add_argument("--out", type=Path, default=HERE / "results" / "sparsity.json")
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args()


class Table(Bench):
    """The checkpoint, its windows, and a row."""

    def row(self, case: str, start: str) -> dict[str, Any]:
        quant = {"bits": self.o.bits, "group_size": self.o.group, "calibrate": start, "sparsity": KINDS[case]}
        began = time.process_time()
        model = self.base(QuantSection.model_validate(quant))
        packing = time.process_time() - began
        untrained = self.perplexity(model)
        torch.manual_seed(self.o.seed)
        attach(model, ADAPTERS["lr_qat"].model_validate({"method": "lr_qat"}))
        section = TrainSection.model_validate(
            {
                "max_steps": self.o.steps,
                "micro_batch_size": self.o.batch,
                "gradient_accumulation_steps": 1,
                "learning_rate": self.o.learning_rate,
                "seed": self.o.seed,
            }
        )
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = self.fit(model, section, folder)
        training = time.process_time() - began
        facts = {"untrained": untrained, "trained": self.perplexity(model), "steps": result.steps}
        return {
            **facts,
            "packing_s": packing,
            "training_s": training,
            **sizes(merged_weights(model).values()),
        }


def sizes(merged: Iterable[Weight]) -> dict[str, float]:
    """Share of weights at zero, and the bytes of the packed layers, as they are and through zstd."""
    exporter, codec = EXPORTERS["compressed-tensors"], pyarrow.Codec("zstd", LEVEL)
    zeros = weights = plain = coded = 0
    for weight in merged:
        assert isinstance(weight, PackedWeight)
        zeros += int((weight.dequantize() == 0).sum())
        weights += weight.shape[0] * weight.shape[1]
        for tensor in exporter.pack(weight).values():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            plain += len(data)
            coded += len(codec.compress(data))
    return {"zeros": zeros / weights, "bytes": plain, "zstd_bytes": coded, "bits": 8 * coded / weights}


def print_table(stored: dict[str, Any]) -> None:
    print("| zeros | start | share | untrained | trained | MB | zstd MB | bits a weight |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for row in stored["rows"]:
        print(
            f"| {row['case']} | {row['start']} | {row['zeros']:.1%} | {row['untrained']:.3f} | "
            f"{row['trained']:.3f} | {row['bytes'] / 1e6:.2f} | {row['zstd_bytes'] / 1e6:.2f} | "
            f"{row['bits']:.2f} |"
        )


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    table = Table(o)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.setdefault("rows", [])
    stored["environment"] = environment()
    done = {(r["case"], r["start"], r["asked"], r["seed"]) for r in rows}
    for start in o.start:
        for case in o.cases:
            asked = f"W{o.bits} g{o.group}, {o.steps} steps of {o.batch} x {o.window}"
            if (case, start, asked, o.seed) in done:
                continue
            row = {"case": case, "start": start, "asked": asked, "seed": o.seed, **table.row(case, start)}
            rows.append(row)
            write_text(o.out, json.dumps(stored, indent=1) + "\n")
            print(json.dumps(row), flush=True)
    print_table(stored)


if __name__ == "__main__":
    main()
