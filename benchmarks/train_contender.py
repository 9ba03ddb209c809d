"""One case of train_bench.py, ready to step, and what the plan says of its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_cases import Case
from benchmarks.train_models import SHAPES, with_lora
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, begin_step
from lowbit_ft.grid import BinaryGrid, Grid, IntGrid
from lowbit_ft.plan.plan import Card, plan
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.train.run import Run

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "llama31-8b-w4-lr-qat.yaml"


class Windows:
    """The same random window for ever, on the CPU, as the trainer's own batches come."""

    def __init__(self, vocabulary: int, length: int) -> None:
        ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        self.batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length)[None]}

    def __next__(self) -> dict[str, Tensor]:
        return dict(self.batch)

    def __len__(self) -> int:
        return 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Contender:
    """One case, ready to step."""

    def __init__(self, case: Case, model: Any, folder: str) -> None:
        keys = {
            "max_steps": 1000,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "scheduler": "constant",
            "learning_rate": 1e-3,
            **case.train,
        }
        if not _has_bitsandbytes():
            keys["optimizer"] = "adamw"  # larger states, and the row says so
        self.case, self.model = case, model
        if case.base == "packed":
            given = {"rank": case.rank} if "rank" in ADAPTERS[case.method].model_fields else {}
            attach(
                model, ADAPTERS[case.method].model_validate({"method": case.method, **given, **case.adapter})
            )
        else:
            with_lora(model, case.rank)
        self.windows = Windows(SHAPES[case.shape].vocabulary, case.length)
        self.run = Run(model, self.windows, None, TrainSection(**keys), Path(folder), {}, None)
        self.steps = 0

    def step(self) -> Tensor:
        """One optimizer step; the loss stays on the device."""
        run = self.run
        begin_step(self.model, self.steps)
        loss = run.loss(next(self.windows))
        run.accelerator.backward(loss / self.case.length)
        run.clip()
        run.optimizer.step()
        run.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()


def _has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def grid_of(case: Case) -> Grid:
    if ADAPTERS[case.method].grid_name == "binary":
        return BinaryGrid(bits=case.bits, group_size=case.group_size)
    return IntGrid(bits=case.bits, group_size=case.group_size, residual_bits=case.residual_bits)


def head_of(case: Case) -> Grid | None:
    return (
        None
        if case.head_bits is None
        else IntGrid(bits=case.head_bits, group_size=case.group_size, residual_bits=0)
    )


def check_key(case: Case) -> tuple[Any, ...]:
    """What a check of gradients holds for: () for what is not ours."""
    return (case.method, case.bits, json.dumps(case.adapter, sort_keys=True)) if case.base == "packed" else ()


def predicted(case: Case, folder: Path, arch: int) -> float:
    """GB that `lowbit-ft plan` says a case of lr_qat takes at its peak, without the CUDA context, which
    PyTorch does not allocate. arch: 10 x compute capability, 0 for a CPU."""
    assert case.method == "lr_qat" and case.base == "packed"
    SHAPES[case.shape].config().save_pretrained(folder)
    keys: dict[str, Any] = {
        "quant": {"bits": case.bits, "residual_bits": case.residual_bits, "group_size": case.group_size},
        "adapter": {"rank": case.rank, **case.adapter},
        "train": {
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "optimizer": "adamw",
            **case.train,
        },
        "data": {"sequence_len": case.length},
    }
    if case.head_bits is not None:
        keys["quant"] |= {"lm_head": case.head_bits, "embeddings": case.head_bits}
    changes = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in keys.items()
        for key, value in values.items()
    ]
    made = plan(
        load_recipe(RECIPE, changes, check=False),
        folder,
        Card(1 << 40, "the device", arch),
        packed_rows=False,
    )
    assert made is not None
    return (made.stages["training"] - made.parts["context"]) / 1e9
