"""Two processes learn from a teacher, and from pairs, as one does: DDP, where each has the model, and FSDP,
where they share it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forks import run_together
from tests.signals import two_processes
from tests.signals.common import OPTIONS, STEPS, go, lesson, student
from tests.signals.two_processes import OTHERS, TEACHERS


def rows(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in line.items() if k.endswith("loss") or "/" in k} for line in lines]
    return [[line[k] for k in sorted(line)] for line in told]


def test_two_processes_are_one(tmp_path: Path) -> None:
    ran = run_together(two_processes.__file__, tmp_path)
    assert ran.returncode == 0, ran.stderr[-4000:]
    ways = dict.fromkeys(TEACHERS, ("ddp", "fsdp")) | {kind: (way,) for way, kind in OTHERS}
    for name in ways:
        model = student()
        kind, teacher = ("mix", name) if name in TEACHERS else (name, TEACHERS[0])
        go(tmp_path / name, model, lesson(kind, model, teacher, **OPTIONS[kind]))
        last = f"checkpoints/step-{STEPS:08d}/adapter.safetensors"
        one = load_file(tmp_path / name / last)
        for way in ways[name]:
            found = tmp_path / f"{way}-{name}"
            for mine, theirs in zip(rows(found), rows(tmp_path / name), strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
            two = load_file(found / last)
            assert one.keys() == two.keys() and len(one) > 20
            for key, tensor in one.items():
                torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-6)
