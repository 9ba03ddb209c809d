"""Two processes train as one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowbit_ft.train.setup import make_accelerator
from tests.forks import run_together
from tests.loop_tools import (
    WARMUP,
    Warming,
    digest,
    go,
    lines,
    losses,
    stop_at,
    warm,
)
from tests.toy import Toy, batches, section


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    done = run_together(__file__, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == {"type": "MULTI_CPU", "processes": 2, "stopped_after": 4}
    one, _ = go(
        tmp_path / "one", valid=batches(seed=1), gradient_accumulation_steps=4, max_steps=8, eval_every=4
    )
    for run in ("two", "resumed"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
        for a, b in zip(
            lines(tmp_path / run, "valid_loss"), lines(tmp_path / "one", "valid_loss"), strict=True
        ):
            assert a["step"] == b["step"] and a["valid_loss"] == pytest.approx(b["valid_loss"], abs=1e-4)
        tokens = [row["tokens"] for row in lines(tmp_path / run)]
        assert tokens == pytest.approx(
            [row["tokens"] for row in lines(tmp_path / "one")], rel=0.2
        )  # padding differs
    assert digest(tmp_path / "two", 8) == digest(
        tmp_path / "resumed", 8
    )  # stopped by a signal to one process only
    assert [p.name for p in (tmp_path / "two").iterdir()].count("metrics.jsonl") == 1
    # l4q's warm-up, where DDP gives the idle scales zeros: Adam must not count them
    warm(tmp_path / "warm-one", Warming(), gradient_accumulation_steps=4)
    for key in ("loss", "valid_loss"):
        found, wanted = ([row[key] for row in lines(tmp_path / f"warm-{n}", key)] for n in ("two", "one"))
        assert found == pytest.approx(wanted, abs=1e-4)
    files = {
        n: tmp_path / f"warm-{n}" / "checkpoints" / "step-00000008" / "optimizer.safetensors"
        for n in ("two", "one")
    }
    two, one = (load_file(files[n]) for n in ("two", "one"))
    counts = {name: int(value) for name, value in one.items() if name.endswith("/step")}
    assert counts == {name: int(value) for name, value in two.items() if name.endswith("/step")}
    assert counts["head.adapter.log_scale/step"] == counts["head.adapter.offset/step"] == 8 - WARMUP
    assert counts["head.adapter.B/step"] == 8


def ddp(folder: Path) -> None:
    """What each of the two processes runs."""
    rank = int(os.environ["RANK"])
    setting: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_every": 4}

    def data(seed: int = 0) -> Any:
        return batches(rank, 2, seed)

    model = Toy(start=0 if rank == 0 else 5)  # DDP hands out the weights of rank 0
    accelerator = make_accelerator(section(), folder, model)
    facts = {"type": accelerator.distributed_type.name, "processes": accelerator.num_processes}
    go(folder / "two", model, data(), data(1), accelerator=accelerator, **setting)
    on_step = stop_at(3) if rank == 1 else None
    _, result = go(folder / "resumed", Toy(), data(), data(1), on_step=on_step, **setting)
    _, _ = go(folder / "resumed", Toy(start=7), data(), data(1), resume=True, **setting)
    warm(folder / "warm-two", Warming(), data=data(), valid=data(1), gradient_accumulation_steps=2)
    if rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts | {"stopped_after": result.steps}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    ddp(Path(sys.argv[1]))
