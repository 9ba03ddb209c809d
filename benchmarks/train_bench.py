"""The training step on one GPU: tokens/s, peak memory, longest length, largest model. One command, under nine
minutes, no network.

    python -m benchmarks.train_bench                 every stage, most valuable first; rows are written as
                                                     they come
    python -m benchmarks.train_bench --dry-run       the same plan on a CPU at tiny sizes; no figures kept
    python -m benchmarks.train_bench --report FILE   table and plot of a results file again

Models have real shapes and random weights (train_models.py). Stages:

    correct   loss and every gradient of each method on the device against the CPU, at a small size; what
              fails is not timed
    speed     8B, 1 x 2048, rank 16, checkpointing on: the contenders with a target take turns with QLoRA
              (NF4, peft) step by step in this process, with the same loss, optimizer and checkpointing code
              (ours): clocks and temperature are the same for both
    more      the other methods and bits, in the same way
    memory    the set-ups the targets name, each alone, the process capped at --cap GB; and what `lowbit-ft
              plan` predicted
    length    8B W4, offload to the CPU: as many tokens as fit

A step is forward, backward, clip and optimizer of one micro-batch, through lowbit_ft.train.run. The figure is
the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.train_bed import Bench
from benchmarks.train_cases import LENGTH, LENGTH_TARGET, LENGTHS, MEMORY, QLORA, SPEED, Case
from benchmarks.train_contender import Contender, check_key, grid_of
from benchmarks.train_models import SHAPES, packed, sharing
from benchmarks.train_report import write_report
from lowbit_ft.adapters import ADAPTERS

RESULTS = Path(__file__).parent / "results"
TOLERANCE = (
    1e-2  # of a gradient's norm, device against CPU in fp32: a code at the edge may fall to the other side
)


# ------------------------------------------------------------------------------------------------ stages


def correct(bench: Bench) -> None:
    """Every method at a small size: loss and gradients on the device against the same on the CPU."""
    seen = set()
    for case in SPEED:
        if case.base != "packed" or check_key(case) in seen:
            continue
        seen.add(check_key(case))

        def act(case: Case) -> dict[str, Any]:
            found = []
            for device in (torch.device("cpu"), bench.device):
                torch.manual_seed(0)
                model = packed(SHAPES["tiny"], grid_of(case), torch.device("cpu"), torch.float32)
                contender = Contender(case, model.to(device), bench.folder)
                for parameter in contender.run.names:  # B starts at zero, which would hide A
                    noise = torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                    )
                    parameter.data += 1e-2 * noise.to(device)
                loss = contender.run.loss(next(contender.windows))
                loss.backward()
                found.append(
                    (
                        float(loss.detach()),
                        {
                            n: p.grad.cpu().double()
                            for p, n in contender.run.names.items()
                            if p.grad is not None
                        },
                    )
                )
                contender.run.release()
            (loss, want), (other, got) = found
            worst = max(float((got[n] - want[n]).norm() / (want[n].norm() + 1e-30)) for n in want)
            if not (
                abs(other - loss) <= 1e-3 * abs(loss) and worst <= TOLERANCE and want.keys() == got.keys()
            ):
                raise AssertionError(
                    f"loss {other} on the device and {loss} on the CPU; worst relative "
                    f"gradient error {worst:.2g}"
                )
            return {"loss_error": abs(other - loss) / abs(loss), "gradient_error": worst}

        whole = {
            k: v for k, v in case.adapter.items() if k != "scale_grad_tokens"
        }  # a draw is another one on another device
        small = replace(
            case, shape="tiny", group_size=32, rank=4, length=48, adapter=whole, train={}, target=None
        )
        if bench.attempt("correct", small, act, 10) is None:
            bench.wrong[check_key(case)] = "its gradients are wrong on this device (see the row `correct`)"


def recall(bench: Bench, file: Path) -> None:
    """The rows that `correct` wrote into another file, as if it had run here."""
    rows = {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    for case in SPEED:
        if case.base == "packed" and (row := rows.get(case.name)):
            if "skipped" in row:
                bench.wrong[check_key(case)] = (
                    f"its gradients are wrong on this device: {row['skipped'][:150]}"
                )
            bench.rows.append(row)


def speed(bench: Bench) -> None:
    """Each contender with a target in turns with QLoRA."""
    _in_turns(bench, [case for case in SPEED if case.target is not None and not case.train.get("compile")])


def more(bench: Bench) -> None:
    """The others."""
    _in_turns(bench, [case for case in SPEED if case.target is None or case.train.get("compile")])


def _in_turns(bench: Bench, cases: list[Case]) -> None:
    bench.limit(None)
    reference: list[Contender] = []

    def first(case: Case) -> dict[str, Any]:
        reference.append(Contender(case, bench.base(case), bench.folder))
        return _timed(bench, {"QLoRA": reference[0]}, case)["QLoRA"]

    bench.attempt("speed", QLORA, first, 40)
    kept: dict[tuple[Any, ...], Any] = {}  # one packed base at a time, shared by its contenders
    order = sorted(cases, key=lambda c: cases.index(next(s for s in cases if _base_key(s) == _base_key(c))))
    for case in order:

        def act(case: Case) -> dict[str, Any]:
            key = _base_key(case)
            if key not in kept:
                kept.clear()
                bench.clean()
                kept[key] = bench.base(case)
            others = bench.held() - _bytes(kept[key])  # QLoRA's, which is not this contender's memory
            contender = Contender(case, sharing(kept[key]), bench.folder)
            try:
                pair = {**({"QLoRA": reference[0]} if reference else {}), case.name: contender}
                rows = _timed(bench, pair, case, others)
            finally:
                contender.run.release()
            row = rows[case.name]
            if "QLoRA" in rows:
                row["qlora_seconds"] = rows["QLoRA"]["seconds"]
                row["ratio"] = row["seconds"] / rows["QLoRA"]["seconds"]
            return row

        bench.attempt("speed", case, act, 15)
    for contender in reference:
        contender.run.release()


def _base_key(case: Case) -> tuple[Any, ...]:
    return (
        case.base,
        ADAPTERS[case.method].grid_name if case.base == "packed" else "",
        case.bits,
        case.residual_bits,
        case.shape,
    )


def _bytes(model: Any) -> int:
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(seen.values())


def _timed(
    bench: Bench, contenders: dict[str, Contender], case: Case, others: int = 0
) -> dict[str, dict[str, Any]]:
    """name -> seconds (median), tokens_per_s, peak_gb without what others hold; two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0)
    for number in range(bench.rounds + 2):
        for name, contender in contenders.items():
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            bench.wait()
            began = time.perf_counter()
            loss = contender.step()
            bench.wait()
            if number >= 2:
                times[name].append(time.perf_counter() - began)
            peaks[name] = max(peaks[name], bench.peak())
            assert bool(torch.isfinite(loss)), f"{name}: the loss is {float(loss)}"
    return {
        name: {
            "seconds": median(t),
            "tokens_per_s": case.length / median(t),
            "peak_gb": (peaks[name] - others) / 1e9,
            "all_seconds": t,
        }
        for name, t in times.items()
    }


def memory(bench: Bench) -> None:
    """Each case alone under the cap."""
    bench.limit(bench.cap)
    for case in MEMORY:
        bench.attempt("memory", case, lambda case: _alone(bench, case, steps=2), 30)


def _alone(bench: Bench, case: Case, steps: int) -> dict[str, Any]:
    contender = Contender(case, bench.base(case), bench.folder)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rest = bench.held()
    try:
        for _ in range(steps):
            bench.wait()
            began = time.perf_counter()
            loss = contender.step()
            bench.wait()
            seconds = time.perf_counter() - began
        peak, reserved = bench.peak(), torch.cuda.max_memory_reserved() if bench.device.type == "cuda" else 0
    finally:
        contender.run.release()
    assert bool(torch.isfinite(loss)), f"the loss is {float(loss)}"
    return {
        "peak_gb": peak / 1e9,
        "reserved_gb": reserved / 1e9,
        "optimizer": contender.run.section.optimizer,
        "rest_gb": rest / 1e9,
        "seconds": seconds,
        "tokens_per_s": case.length / seconds,
    }


def length(bench: Bench) -> None:
    """Longer and longer windows, until memory or time ends."""
    bench.limit(bench.cap)
    longest = 0
    for tokens in LENGTHS:
        case = replace(
            LENGTH,
            name=f"8B W4, 1 x {tokens}",
            length=tokens,
            target=("peak_gb", bench.cap) if tokens == LENGTH_TARGET else None,
        )
        if (
            bench.attempt("length", case, lambda case: _alone(bench, case, steps=2), 20 + tokens / 1000)
            is None
        ):
            break
        longest = tokens
    if not bench.dry:
        print(f"longest window that fits {bench.cap} GB: {longest} tokens", flush=True)


STAGES = {"correct": correct, "speed": speed, "memory": memory, "more": more, "length": length}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    p.add_argument("--budget", type=float, default=520, help="seconds for everything")
    p.add_argument(
        "--cap", type=float, default=24.0, help="GB (10^9 bytes) the memory and length stages may use"
    )
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--layers", type=int, help="cut every shape after so many layers")
    p.add_argument("--dry-run", action="store_true")
    p.add_argument(
        "--checked",
        type=Path,
        metavar="FILE",
        help="what `correct` found in another run of today: it is not run again",
    )
    p.add_argument("--report", type=Path, metavar="FILE")
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    if o.report:
        print(write_report(o.report))
        return
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when CUDA starts
    if not o.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --dry-run walks the plan on a CPU")
    if o.out is None:
        device = "dry-run" if o.dry_run else torch.cuda.get_device_name().replace(" ", "-").lower()
        o.out = RESULTS / f"train_bench-{device}.json"
    torch.manual_seed(0)
    bench = Bench(o)
    if o.checked and o.checked.is_file():
        recall(bench, o.checked)
        o.stages = [stage for stage in o.stages if stage != "correct"]
    for stage in o.stages:
        STAGES[stage](bench)
    bench.predict()
    if not o.dry_run:
        print(write_report(o.out))
    # On a GPU memory and time may end; on a dry run every case must go through.
    if failed := [
        row["name"] for row in bench.rows if "skipped" in row and (o.dry_run or row["stage"] == "correct")
    ]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
