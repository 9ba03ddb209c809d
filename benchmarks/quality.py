"""Quality: perplexity of any methods x grids on a checkpoint, at equal tokens, in one table.

    python benchmarks/quality.py --methods gptq lr_qat full_qat --grids 3:128 2:64 --seeds 0 1 2
    python benchmarks/quality.py --model outliers --grids 4:128:8 4:128:4 4:128:4:4 2:64 --out FILE

A grid is bits:group of the weights, then the bits of the layers' inputs (per token, symmetric) and of keys
and values (per token and head) where they are on a grid too: W4A8, W4A4, W4A4KV4 and W2A16 of the second
command. --model takes a folder, SmolLM2's of real_model.py too, or `outliers`: the tiny Llama with planted
outlier channels (outliers.py). One file of rows is of one model.

Windows of plain text for training and validation; every trained method sees the same windows in the same
order (one order per seed) and the same number of steps. Baselines without training: rtn (absmax or minmax),
mse, gptq. `lora` trains a side adapter on the rounded base and is measured twice: as trained, and after the
requantization its merge needs.
Defaults are the recipe's defaults, which were found with this script (LOG.md).

KL is to the full-precision model. Rows are kept in --out as they come (JSON), so a stopped run goes on; the
table is printed from that file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from outliers import plant
from rich.console import Console

from lowbit_ft.activations import Scheme
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, attach, begin_step
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.evaluate.perplexity import Reference, evaluate
from lowbit_ft.files.atomic import write_text
from lowbit_ft.kv_cache import KVConfig, place_kv_cache
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.load import load_tokenizer
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.rundir import environment
from lowbit_ft.train.loop import TrainResult, train

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
UNTRAINED = ("rtn", "mse", "gptq")
TRAINED = tuple(ADAPTERS)
RATES = "method=rate, for example full_qat=4e-3, where it is not that of --learning-rate"


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"), help="a folder, or outliers")
    p.add_argument("--train", default=str(ASSETS / "text" / "train.jsonl"), help='jsonl of {"text": ...}')
    p.add_argument("--valid", default=str(ASSETS / "text" / "valid.jsonl"))
    p.add_argument("--methods", nargs="+", default=[*UNTRAINED, *TRAINED], choices=[*UNTRAINED, *TRAINED])
    p.add_argument(
        "--grids", nargs="+", default=["4:128", "3:128", "2:64"], help="bits:group[:inputs[:cache]]"
    )
    p.add_argument("--symmetry", nargs="+", default=["sym", "asym"], choices=["sym", "asym"])
    p.add_argument(
        "--start", default="gptq", help="calibrator that trained methods on integer grids start from"
    )
    p.add_argument(
        "--plane-start", default="alternating", help="calibrator of the sign planes of alpha_tuning"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--batch", type=int, default=8, help="windows per step")
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=160)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--scale-learning-rate", type=float, default=None)
    p.add_argument("--rates", nargs="*", default=[], help=RATES)
    p.add_argument("--set", nargs="*", default=[], help="adapter options, for example rank=32 alpha=32")
    p.add_argument("--calibration", nargs="*", default=[], help="of gptq, for example act_order=true")
    p.add_argument("--note", default="", help="kept with each row, to tell sweeps apart")
    p.add_argument("--out", type=Path, default=HERE / "results" / "quality.json")
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


@dataclass(frozen=True)
class Setting:
    """What is on which grid: bits of the weights, their group, bits of inputs and of keys and values."""

    bits: int
    group: int
    symmetric: bool
    inputs: int = 16
    cache: int = 16

    @classmethod
    def of(cls, text: str, symmetric: bool) -> Setting:
        """Of "4:128:8:4". ValueError saying how one is written."""
        parts = text.split(":")
        if not 2 <= len(parts) <= 4 or not all(part.lstrip("-").isdigit() for part in parts):
            raise ValueError(f"--grids: got {text!r}; needs bits:group[:inputs[:cache]]")
        bits, group, *rest = (int(part) for part in parts)
        return cls(bits, group, symmetric, *rest)

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Setting:
        wide = (row.get("inputs", 16), row.get("cache", 16))
        return cls(row["bits"], row["group_size"], row["symmetric"], *wide)

    def to_json(self) -> dict[str, Any]:
        """Inputs and cache where they are on a grid."""
        wide = {key: value for key, value in (("inputs", self.inputs), ("cache", self.cache)) if value != 16}
        return {"bits": self.bits, "group_size": self.group, "symmetric": self.symmetric} | wide

    def __str__(self) -> str:
        wide = "" if self.inputs == 16 else f"A{self.inputs}"
        wide += "" if self.cache == 16 else f"KV{self.cache}"
        return f"W{self.bits}{wide} g{self.group} {'sym' if self.symmetric else 'asym'}"

    def place(self, model: Any) -> None:
        """Inputs and cache of a packed model on their grids."""
        if self.inputs != 16:
            scheme = Scheme(kind="token", bits=self.inputs)
            place_activations(model, {name: scheme for name, _ in hosts(model)})
        if self.cache != 16:
            place_kv_cache(model, KVConfig.of(self.cache, "token_head"))


class Bench:
    """The checkpoint, its windows, and one run of a method on a grid."""

    def __init__(self, o: argparse.Namespace):
        self.o = o
        self.checkpoint = Checkpoint.open(o.model, dtype="float32")
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.train = self.windows(o.train)
        valid = self.windows(o.valid)[: o.valid_windows]
        batches = Batches(Examples(valid), 16, 0, seed=0, shuffle=False)
        self.valid = [{k: v for k, v in b.items() if k != "position_ids"} for b in batches.one_epoch()]
        self.bases: dict[str, Any] = {}

    def windows(self, path: str) -> list[Example]:
        """The whole text joined by the end-of-text token, cut into windows; loss on every token."""
        texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
        joined = (self.tokenizer.eos_token or "\n").join(texts)
        ids = self.tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
        size = self.o.window
        return [
            Example(ids[i : i + size], ids[i : i + size], [size]) for i in range(0, len(ids) - size + 1, size)
        ]

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """256 training windows, the same for every method and seed."""
        batches = Batches(Examples(self.train), 32, 0, seed=0)
        return [{"input_ids": next(batches)["input_ids"]} for _ in range(8)]

    def base(self, quant: QuantSection) -> Any:
        """A fresh packed model; each setting is calibrated once."""
        key = quant.model_dump_json()
        if key not in self.bases:
            self.bases[key] = quantize(
                self.checkpoint, quant, dtype=torch.float32, calibration=self.calibration
            )[0]
        return copy.deepcopy(self.bases[key])

    def perplexity(self, model: Any) -> float:
        found = evaluate(model, self.valid, "").perplexity
        assert found is not None, "a language model"
        return found

    @cached_property
    def reference(self) -> Reference:
        device, dtype = torch.device("cpu"), torch.float32
        return Reference(self.checkpoint, self.valid, attention="sdpa", device=device, dtype=dtype)

    def measured(self, model: Any) -> dict[str, float]:
        row = evaluate(model, self.valid, "", self.reference)
        assert row.kl is not None and row.perplexity is not None
        return {"perplexity": row.perplexity, "kl": row.kl}

    def fit(self, model: Any, section: TrainSection, folder: str) -> TrainResult:
        """Train it on the training windows; its log is left in `folder`."""
        result = train(
            model,
            Batches(Examples(self.train), self.o.batch, 0, seed=section.seed),
            None,
            section,
            folder,
            on_step=lambda step: begin_step(model, step),
            console=Console(quiet=True),
        )
        if result.stopped:
            raise SystemExit("stopped by a signal; rows that are done are kept")
        return result

    def run(self, method: str, setting: Setting, seed: int) -> dict[str, float]:
        binary = method == "alpha_tuning"
        calibrate = {"rtn": "absmax" if setting.symmetric else "minmax", "mse": "mse", "gptq": "gptq"}.get(
            method, self.o.plane_start if binary else self.o.start
        )
        quant = QuantSection.model_validate(
            {
                "grid": "binary" if binary else "integer",
                "bits": setting.bits,
                "group_size": setting.group,
                "symmetric": setting.symmetric,
                "calibrate": calibrate,
                "calibration": dict(item.split("=", 1) for item in self.o.calibration),
            }
        )
        model = self.base(quant)
        setting.place(model)
        if method in UNTRAINED:
            return self.measured(model)
        start = self.perplexity(model)
        torch.manual_seed(seed)
        chosen = dict(item.split("=", 1) for item in self.o.set)
        fields = ADAPTERS[method].model_fields
        keys = {k: v for k, v in chosen.items() if k in fields} | {"method": method}
        attach(model, ADAPTERS[method].model_validate(keys))
        rates = dict(item.split("=", 1) for item in self.o.rates)
        rate = float(rates.get(method, self.o.learning_rate))
        # Numbers of -1, 0 and 1 have an optimizer and a curve of their own, and the rate is a share.
        ternary = ADAPTERS[method].ternary
        own: dict[str, Any] = {"optimizer": "t_signsgd", "scheduler": "lota"} if ternary else {}
        section = TrainSection(
            max_steps=self.o.steps,
            micro_batch_size=self.o.batch,
            gradient_accumulation_steps=1,
            learning_rate=rate,
            scale_learning_rate=self.o.scale_learning_rate,
            seed=seed,
            **own,
        )
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self.fit(model, section, folder)
        seconds = time.perf_counter() - began
        row = {"start": start, "seconds": seconds} | self.measured(model)
        row["trained"] = row["perplexity"]
        if method == "lora":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the loss it warns of is the number this row is about
                for name, layer in list(adapted_layers(model)):
                    assert layer.adapter is not None
                    model.set_submodule(name, PackedLinear(layer.adapter.merge(layer.base), layer.bias))
            setting.place(model)
            row |= self.measured(model)
        return row


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return (Setting.of_row(row), *(row[k] for k in ("method", "seed", "steps", "note")))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown: methods x grids, mean perplexity over seeds and its spread; lora shows what trained -> what
    ships.
    """
    grids = sorted(
        {Setting.of_row(r) for r in rows},
        key=lambda s: (-s.bits, s.group, not s.symmetric, -s.inputs, -s.cache),
    )
    print("| method | " + " | ".join(map(str, grids)) + " |")
    print("|---|" + "--:|" * len(grids))
    for name, note in dict.fromkeys((r["method"], r["note"]) for r in rows):
        cells = []
        for grid in grids:
            mine = [r for r in rows if (r["method"], r["note"], Setting.of_row(r)) == (name, note, grid)]
            values = [r["perplexity"] for r in mine]
            text = (
                ""
                if not values
                else f"{mean(values):.3f}" + (f" ±{pstdev(values):.3f}" if len(values) > 1 else "")
            )
            if values and name == "lora":
                text = f"{mean(r['trained'] for r in mine):.3f} -> {text}"
            if values and all("kl" in r for r in mine):
                text += f" (KL {mean(r['kl'] for r in mine):.4f})"
            cells.append(text)
        print(f"| {name}{f' ({note})' if note else ''} | " + " | ".join(cells) + " |")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        o = options()
        name = Path(o.model).name
        if o.model == "outliers":
            o.model = str(plant(ASSETS / "tiny-llama", Path(folder) / name))
        measure(o, name)


def measure(o: argparse.Namespace, name: str) -> None:
    """All rows that are not there yet, of the model of this name, and the table."""
    torch.set_num_threads(o.threads)
    bench = Bench(o)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.get("rows", [])
    if "full_precision" not in stored:
        stored |= {"full_precision": bench.reference.row().perplexity, "environment": environment()}
    if stored.setdefault("model", name) != name:
        raise SystemExit(f"{o.out}: has rows of {stored['model']}, not of {name}; name another --out")
    done = {key_of(r) for r in rows}
    for seed in o.seeds:
        for grid in o.grids:
            for setting in [Setting.of(grid, s == "sym") for s in o.symmetry]:
                for method in o.methods:
                    if method in UNTRAINED and seed != o.seeds[0]:
                        continue
                    if method == "alpha_tuning" and not setting.symmetric and "sym" in o.symmetry:
                        continue  # sign planes have no zero point: one column holds them
                    fact = {
                        "method": method,
                        **setting.to_json(),
                        "seed": seed,
                        "steps": o.steps,
                        "note": o.note,
                        "learning_rate": float(
                            dict(item.split("=", 1) for item in o.rates).get(method, o.learning_rate)
                        ),
                        "scale_learning_rate": o.scale_learning_rate,
                        "start_calibrator": o.plane_start if method == "alpha_tuning" else o.start,
                        "options": o.set,
                    }
                    if key_of(fact) in done:
                        continue
                    row = fact | bench.run(method, setting, seed)
                    assert math.isfinite(row["perplexity"])
                    rows.append(row)
                    print(
                        f"{setting} {method} seed {seed}: {row['perplexity']:.3f} KL {row['kl']:.4f}",
                        flush=True,
                    )
                    write_text(o.out, json.dumps(stored | {"rows": rows}, indent=1) + "\n")
    print(f"\nfull precision {stored['full_precision']:.3f}\n")
    print_table(rows)


if __name__ == "__main__":
    main()
