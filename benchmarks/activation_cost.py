"""Step time and memory of training with inputs and cache on grids against A16, interleaved in one process.

    python benchmarks/activation_cost.py --rounds 12
    python benchmarks/activation_cost.py --dtype bfloat16 --checkpointing --cases A16 A8 A4

One optimizer step of lr_qat on fixed tokens of a packed model, through the forward that trains, labels. Each
round takes one step of every case in turn, so that a busy machine slows them alike; printed are medians of
wall and of processor seconds, and of the ratio to the first case in the same round. Memory is counted twice:
the bytes that autograd saves for backward (each storage once, the model's own left out), and the allocator's
peak within one step (profiler, CPU). A8 and A4 are per token; g128 has a scale per 128 channels, KV4 a cache
of 4 bits besides.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from loss_memory import allocator_peak
from signal_cost import ASSETS, stepper

from lowbit_ft.activations import Scheme
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.files.atomic import write_text
from lowbit_ft.kv_cache import KVConfig, place_kv_cache
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.signal import SignalSection
from lowbit_ft.rundir import environment
from lowbit_ft.signals import SIGNALS, Lesson

CASES: dict[str, tuple[Scheme | None, KVConfig | None]] = {
    "A16": (None, None),
    "A8": (Scheme(kind="token", bits=8), None),
    "A4": (Scheme(kind="token", bits=4), None),
    "A8 asym": (Scheme(kind="token", bits=8, symmetric=False), None),
    "A4 g128": (Scheme(kind="group", bits=4, group_size=128), None),
    "A8 dual": (Scheme(kind="dual", bits=8), None),
    "A8 KV4": (Scheme(kind="token", bits=8), KVConfig.of(4, "token_head")),
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument(
        "--cases", nargs="+", default=list(CASES), choices=list(CASES), help="the first is compared with"
    )
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group-size", type=int, default=128)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "activation_cost.json")
    return p.parse_args()


def saved_bytes(model: Any, step: Callable[[], None]) -> int:
    """What autograd keeps for backward in one step: every storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    quant = QuantSection.model_validate({"bits": o.bits, "group_size": o.group_size, "calibrate": "absmax"})
    base = quantize(Checkpoint.open(o.model, dtype=o.dtype), quant, dtype=getattr(torch, o.dtype))[0]
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (o.batch, o.length), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], None]] = {}
    kept, peaks = {}, {}
    for name in o.cases:
        scheme, cache = CASES[name]
        model = copy.deepcopy(base)
        attach(model, ADAPTERS["lr_qat"].model_validate({"method": "lr_qat"}))
        place_activations(model, {} if scheme is None else {layer: scheme for layer, _ in hosts(model)})
        place_kv_cache(model, cache)
        lesson = Lesson(SIGNALS["labels"], SignalSection(kind="labels"), None)
        steps[name] = step = stepper(model, lesson, ids, o)
        step()  # makes the optimizer's averages
        kept[name] = saved_bytes(model, step)
        peaks[name] = allocator_peak(step)
    wall: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(o.rounds):
        for name, step in steps.items():
            began, worked = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - worked)
    first = o.cases[0]
    heads = [f"{what} | of {first}" for what in ("seconds", "processor s", "saved MB", "peak MB")]
    print("| inputs | " + " | ".join(heads) + " |")
    print("|---|" + "--:|" * 8)
    rows = []
    for name in o.cases:
        row: dict[str, Any] = {"case": name}
        for key, times in (("seconds", wall), ("cpu_seconds", busy)):
            row[key] = median(times[name])
            row[f"{key}_ratio"] = median(a / b for a, b in zip(times[name], times[first], strict=True))
        for key, counts in (("saved_mb", kept), ("peak_mb", peaks)):
            row |= {key: counts[name] / 1e6, f"{key}_ratio": counts[name] / counts[first]}
        rows.append(row)
        cells = [
            f"{value:.3f}" if "mb" not in key else f"{value:.2f}" for key, value in list(row.items())[1:]
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    facts = {key: value for key, value in vars(o).items() if key != "out"} | {"model": Path(o.model).name}
    o.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(o.out, json.dumps({"environment": environment(), **facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
