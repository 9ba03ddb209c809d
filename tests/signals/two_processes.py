"""What test_two_processes.py runs under torchrun: DDP and FSDP with each teacher, and other signals."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from lowbit_ft.train.sharding import shard
from tests.signals.common import CPU, OPTIONS, go, lesson, student

TEACHERS = ("residual", "other")
# Sharded, the reference is one more forward of all; an intervention leaves tensors without a gradient.
OTHERS = (("fsdp", "dpo"), ("ddp", "orpo"), ("ddp", "layers"))


def together(folder: Path) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    rank = int(os.environ["RANK"])
    for teacher in TEACHERS:
        model = student(start=0 if rank == 0 else 5)
        go(folder / f"ddp-{teacher}", model, lesson("mix", model, teacher, **OPTIONS["mix"]), rank, 2)
        model = student(start=0 if rank == 0 else 5)
        mine = lesson("mix", model, teacher, **OPTIONS["mix"])
        shard(model, CPU)
        go(folder / f"fsdp-{teacher}", model, mine, rank, 2, gradient_checkpointing=True)
    for way, kind in OTHERS:
        model = student(start=0 if rank == 0 else 5)
        mine = lesson(kind, model, **OPTIONS[kind])
        if way == "fsdp":
            shard(model, CPU)
        go(folder / f"{way}-{kind}", model, mine, rank, 2)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    together(Path(sys.argv[1]))
