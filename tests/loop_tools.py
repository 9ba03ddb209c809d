"""What the tests of the training loop share: a toy trained with a line, its log, its checkpoints, a toy with
a warm-up, a signal at a step.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, begin_step
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.train.loop import TrainResult, train
from tests.toy import VOCABULARY, Toy, batches, quiet, section

ROOT = Path(__file__).parents[1]


def go(
    run_dir: Path, model: Any = None, data: Any = None, valid: Any = None, **changes: Any
) -> tuple[Any, TrainResult]:
    """Train a toy; keyword arguments of train() are taken out of the changes to the section."""
    names = ("meta", "resume", "on_step", "choose_after", "console", "accelerator", "lesson")
    options = {name: changes.pop(name) for name in names if name in changes}
    model = model if model is not None else Toy()
    data = data if data is not None else batches()
    result = train(model, data, valid, section(**changes), run_dir, **({"console": quiet()} | options))
    return model, result


def lines(run_dir: Path, key: str = "loss") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in lines(run_dir)]


def digest(run_dir: Path, step: int) -> str:
    file = run_dir / "checkpoints" / f"step-{step:08d}" / "adapter.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def stop_at(step: int, number: int = signal.SIGTERM) -> Any:
    def on_step(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    return on_step


WARMUP = 3


class Warming(torch.nn.Module):
    """The toy with one packed 2-bit layer and l4q on it: unrounded for WARMUP steps, then on the grid."""

    def __init__(self, start: int = 0, **options: Any) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("embedding", torch.randn(VOCABULARY, 32, generator=g))
        head = torch.randn(VOCABULARY, 32, generator=g) / 4
        self.head = PackedLinear(
            CALIBRATORS["minmax"].run(head, IntGrid(bits=2, group_size=32, symmetric=False), Stats())
        )
        torch.manual_seed(start)
        attach(self, ADAPTERS["l4q"](rank=4, warmup_steps=WARMUP, offset="float", **options))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return transformers.utils.ModelOutput(logits=self.head(self.embedding[input_ids]))


def warm(run_dir: Path, model: Any, on_step: Any = None, **changes: Any) -> TrainResult:
    """Train it as the pipeline does; on_step(step) is called after begin_step."""

    def step_of(step: int) -> None:
        begin_step(model, step)
        if on_step is not None:
            on_step(step)

    setting = {"valid": batches(seed=1), "eval_every": 1, "choose_after": WARMUP, "scale_learning_rate": 0.01}
    return go(run_dir, model, on_step=step_of, **(setting | changes))[1]


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Also those that do not train: without train_scale only the switch changes log_scale."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
