"""What the stages of train_bench.py stand on: the device, the clock, and the rows, on disk as they come."""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_cases import Case
from benchmarks.train_contender import check_key, grid_of, head_of, predicted
from benchmarks.train_models import SHAPES, dense, nf4, packed
from lowbit_ft.rundir import environment


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class Bench:
    """The rows so far, the clock, the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dry, self.budget, self.cap = options.dry_run, options.budget, options.cap
        self.began, self.rows, self.out = time.monotonic(), [], options.out
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.arch = 0 if self.dry else _capability()
        self.rounds = 1 if self.dry else options.rounds
        self.dtype = torch.float32 if self.dry else torch.bfloat16
        self.layers = options.layers
        self.wrong: dict[tuple[Any, ...], str] = {}  # what `correct` checks -> why it must not be timed
        self.folder = tempfile.mkdtemp(prefix="train_bench-")
        self.head = {"environment": environment(), "options": {k: str(v) for k, v in vars(options).items()}}

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def write(self, stage: str, case: Case, **values: Any) -> None:
        """One more row, on disk at once."""
        target = (
            {}
            if case.target is None or self.dry
            else {"target": list(case.target), "met": _met(case, values)}
        )
        row = {"stage": stage, "name": case.name, "case": _plain(case), **values, **target}
        self.rows.append(row)
        shown = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in values.items()
            if k not in ("all_seconds", "case")
        )
        print(f"[{time.monotonic() - self.began:5.0f} s] {stage}: {case.name}: {shown}", flush=True)
        self.keep()

    def keep(self) -> None:
        """The rows so far, on disk; a dry run keeps no figures."""
        if self.dry:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.out)

    def attempt(
        self, stage: str, case: Case, act: Callable[[Case], dict[str, Any]], seconds: float
    ) -> dict[str, Any] | None:
        """act(case), written as a row; a row with the reason when there is no time, no memory, no library,
        or the method was wrong.
        """
        case = case.tiny() if self.dry else case
        reason = self.wrong.get(check_key(case), "")
        if not reason and self.left() < seconds:
            reason = f"no time left ({self.left():.0f} s, it takes about {seconds:.0f})"
        values: dict[str, Any] | None = None
        if not reason:
            self.clean()  # what the case before left in cycles must not count here
            try:
                values = act(case)
            except torch.OutOfMemoryError as error:
                reason = f"out of memory: {str(error).splitlines()[0][:160]}"
            except Exception as error:  # one case must not take the others' rows with it
                reason = f"{type(error).__name__}: {str(error)[:300]}"
        self.write(stage, case, **(values if values is not None else {"skipped": reason}))
        self.clean()
        return values

    def predict(self) -> None:
        """What plan says of the rows whose peak was measured, last: it needs no device, and a row must not
        be lost to it.
        """
        for row in self.rows:
            if row["stage"] in ("memory", "length") and "peak_gb" in row and (self.left() > 30 or self.dry):
                case = Case(
                    name=row["name"],
                    **{**row["case"], "train": {**row["case"]["train"], "optimizer": row["optimizer"]}},
                )
                try:
                    row["predicted_gb"] = predicted(
                        case, Path(self.folder) / f"config-{case.shape}", self.arch
                    )
                except Exception as error:
                    row["predicted_gb"] = None
                    print(f"plan: {row['name']}: {error}", flush=True)
        self.keep()

    # ------------------------------------------------------------------ the device

    def clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def limit(self, gigabytes: float | None) -> None:
        """No more than so many GB for this process from here on (None: the whole card)."""
        if self.device.type == "cuda":
            whole = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(
                1.0 if gigabytes is None else min(1.0, gigabytes * 1e9 / whole)
            )

    # ------------------------------------------------------------------ models

    def base(self, case: Case) -> Any:
        shape = SHAPES[case.shape] if self.layers is None else SHAPES[case.shape].first(self.layers)
        if case.base == "nf4":
            return nf4(shape, self.device, self.dtype)
        if case.base == "dense":
            return dense(shape, self.device, self.dtype)
        return packed(shape, grid_of(case), self.device, self.dtype, head=head_of(case))


def _plain(case: Case) -> dict[str, Any]:
    return {k: v for k, v in vars(case).items() if k not in ("name", "target")}


def _met(case: Case, values: dict[str, Any]) -> bool | None:
    assert case.target is not None
    value = values.get(case.target[0])
    return None if value is None else value <= case.target[1]
