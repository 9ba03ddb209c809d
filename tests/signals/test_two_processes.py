"""Two processes learn from a teacher as one does: DDP, where each has the model, and FSDP, where they share
it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forks import run_together
from tests.signals import two_processes
from tests.signals.common import OPTIONS, STEPS, go, lesson, student
from tests.signals.two_processes import TEACHERS


def rows(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[k] for k in ("loss", "labels_loss", "logits_loss")] for line in lines if "loss" in line]


def test_two_processes_are_one(tmp_path: Path) -> None:
    ran = run_together(two_processes.__file__, tmp_path)
    assert ran.returncode == 0, ran.stderr[-4000:]
    for teacher in TEACHERS:
        model = student()
        go(tmp_path / teacher, model, lesson("mix", model, teacher, **OPTIONS["mix"]))
        last = f"checkpoints/step-{STEPS:08d}/adapter.safetensors"
        one = load_file(tmp_path / teacher / last)
        for way in ("ddp", "fsdp"):
            found = tmp_path / f"{way}-{teacher}"
            for mine, theirs in zip(rows(found), rows(tmp_path / teacher), strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)
            two = load_file(found / last)
            assert one.keys() == two.keys() and len(one) > 20
            for name, tensor in one.items():
                torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-6)
