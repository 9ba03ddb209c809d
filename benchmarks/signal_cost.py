"""Step time and peak memory of every signal and teacher against labels, interleaved in one process.

    python benchmarks/signal_cost.py --rounds 12
    python benchmarks/signal_cost.py --model FOLDER --length 512 --checkpointing

One optimizer step of lr_qat on fixed tokens of a packed model, through the forward that trains (losses.py).
Each round takes one step of every case in turn, so that a busy machine slows them alike; printed are medians
and their ratio to labels, and the allocator's peak within one step (profiler, CPU). `stored` stands for a
teacher whose 64 most likely tokens were written before (cached): it costs no forward."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from loss_memory import TOP, allocator_peak

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.signal import SignalSection
from lowbit_ft.rundir import environment
from lowbit_ft.signals import SIGNALS, Ask, Lesson, OtherModel, Sparse, Teacher
from lowbit_ft.signals.base import Answers
from lowbit_ft.signals.residual import Residual
from lowbit_ft.train.losses import Targets, chunked_head, loss_forward
from lowbit_ft.train.setup import activation_checkpointing

HELD = ExitStack()  # teachers at work, for as long as the process lives
ASSETS = Path(__file__).resolve().parent.parent / "recipes" / "assets"


class Stored(Teacher):
    """Its most likely tokens of every position are there already."""

    def __init__(self, tokens: int) -> None:
        super().__init__({"teacher": "stored"})
        ids = torch.arange(TOP).repeat(tokens, 1)
        self.said = Sparse(ids, torch.full((tokens, TOP), -5.0), torch.full((tokens,), -0.6))

    def answers(self, ask: Ask) -> Answers:
        return lambda places: Sparse(*(t[places] for t in (self.said.ids, self.said.log_p, self.said.rest)))


def stepper(model: Any, lesson: Lesson, ids: torch.Tensor, o: argparse.Namespace) -> Callable[[], None]:
    """One optimizer step on fixed tokens."""
    positions = torch.arange(ids.shape[1])[None].expand_as(ids).contiguous()
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    student = chunked_head(model)
    if lesson.teacher is not None:
        HELD.enter_context(lesson.teacher.begin(student))
    forward = loss_forward(model, "chunked", lesson, student)
    model.train()
    if o.checkpointing:
        activation_checkpointing(model, True)
    weights = torch.tensor(lesson.weights) / ids.numel()

    def step() -> None:
        targets = Targets(ids, torch.device("cpu"), None, batch)
        sums = forward(model, input_ids=ids, position_ids=positions, labels=targets)
        (sums * weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cases(o: argparse.Namespace) -> dict[str, Callable[[], None]]:
    checkpoint = Checkpoint.open(o.model, dtype=o.dtype)
    dtype = getattr(torch, o.dtype)

    def packed(bits: int, residual: int) -> Any:
        quant = QuantSection.model_validate(
            {"bits": bits, "group_size": -1, "calibrate": "absmax", "residual_bits": residual}
        )
        return quantize(checkpoint, quant, dtype=dtype)[0]

    base, eight = packed(o.bits, 4), packed(8, 0)
    vocabulary = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (o.batch, o.length), generator=generator)
    out: dict[str, Callable[[], None]] = {}
    for kind, signal in SIGNALS.items():
        for name in ("residual", "checkpoint", "stored") if signal.asks else ("",):
            model = copy.deepcopy(base)
            attach(model, ADAPTERS["lr_qat"].model_validate({"method": "lr_qat"}))
            made: dict[str, Callable[[], Teacher | None]] = {
                "": lambda: None,
                "residual": lambda model=model: Residual(model),
                "checkpoint": lambda: OtherModel(copy.deepcopy(eight), {}),
                "stored": lambda: Stored(ids.numel()),
            }
            lesson = Lesson(signal, SignalSection(kind=kind), made[name]())
            out[f"{kind} {name}".strip()] = stepper(model, lesson, ids, o)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--dtype", default="float32")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "signal_cost.json")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    steps = cases(o)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():  # the first makes the optimizer's averages, the second is counted
        step()
        peaks[name] = allocator_peak(step)
    for _ in range(o.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    base = "labels"
    print(f"| signal, teacher | seconds | of {base} | MB in a step | of {base} |\n|---|--:|--:|--:|--:|")
    rows = []
    for name, times in seconds.items():
        ratio = median(a / b for a, b in zip(times, seconds[base], strict=True))
        row = {"case": name, "seconds": median(times), "ratio": ratio, "peak_mb": peaks[name] / 1e6}
        rows.append(row | {"peak_ratio": peaks[name] / peaks[base]})
        print(
            f"| {name} | {median(times):.3f} | {ratio:.2f} | {peaks[name] / 1e6:.1f} | "
            f"{peaks[name] / peaks[base]:.2f} |"
        )
    facts = {k: v for k, v in vars(o).items() if k != "out"} | {"model": Path(o.model).name}
    text = json.dumps({"environment": environment(), **facts, "rows": rows}, indent=1)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(o.out, text + "\n")
    HELD.close()


if __name__ == "__main__":
    main()
