"""Runs in processes of their own: killed and started again, and two of them together."""

import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kill_and_resume import Line, kill, pair, problems, shas
from lowbit_ft import pipeline
from tests.forks import Forked, run, run_together, together
from tests.line_tools import QUICK, recipe

pytestmark = pytest.mark.usefixtures("in_the_repository")
SHORT = [*QUICK, "quant.targets=['*.layers.0.*']"]  # one block of the four packed: every stage, half the time


def adapter_sha(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def command(out: Path, *overrides: str) -> list[str]:
    return ["-m", "lowbit_ft", "train", "recipes/quickstart.yaml", *SHORT, f"output={out}", *overrides]


def alone(out: Path, *overrides: str) -> None:
    """`lowbit-ft train` here, on one thread as in the children."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipeline.train(recipe(out, SHORT[-1], *overrides))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    steps = "train.max_steps=6"
    alone(tmp_path / "whole", steps)
    for how in (signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / how.name
        first = Forked(command(out, steps))
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (out / "checkpoints" / "step-00000002").exists():
            time.sleep(0.05)
        first.send_signal(how)
        said = "".join(first.communicate(timeout=120))
        assert not (out / "adapter").exists(), "it was over before it could be killed"
        if how == signal.SIGTERM:
            assert first.returncode == 130 and "everything is saved" in said
        again = run(command(out, steps))
        assert again.returncode == 0, again.stderr
        assert adapter_sha(out) == adapter_sha(tmp_path / "whole"), how.name


class ForkedLine(Line):
    """The line of benchmarks/kill_and_resume.py in processes that need not import first."""

    def start(self, output: Path, *more: str) -> Any:
        return Forked(["-m", "lowbit_ft", *self.arguments, *more, f"output={output}"])

    def verify(self, folder: Path) -> tuple[int, str]:
        done = run(["-m", "lowbit_ft", "verify", folder])
        return done.returncode, done.stderr


@pytest.mark.slow
def test_two_at_once_and_killed_with_another_one_starting(tmp_path: Path) -> None:
    """The short form of benchmarks/kill_and_resume.py: a pair, and two kills over the whole line."""
    short = ["eval.kl=false", "eval.windows=1", "eval.generate=[]", "data.train.limit=60"]
    line = ForkedLine("recipes/quickstart.yaml", [*SHORT, *short])
    began = time.monotonic()
    line.finish(tmp_path / "whole")
    length, wanted = time.monotonic() - began, [shas(tmp_path / "whole")]
    assert {Path(name).parent.name for name in wanted[0]} == {"base", "adapter", "merged", "exported"}
    seen = pair(line, tmp_path / "pair", "", apart=0.0)
    assert "finished" in seen and "FAILED" not in seen
    assert problems(line, tmp_path / "pair", wanted) == []
    for how, share, second in ((signal.SIGTERM, 0.8, False), (signal.SIGKILL, 0.5, True)):
        out = tmp_path / how.name
        assert "UNEXPECTED" not in kill(line, out, how, share * length, second)
        line.finish(out)
        assert problems(line, out, wanted) == []


@pytest.mark.slow
def test_two_processes_learn_the_same_from_a_teacher_that_was_asked(tmp_path: Path) -> None:
    """The main one asks, both read; killed in between, they go on to the same bytes."""
    cached = ["train.teacher=cached", "train.signal={kind: mix, on: all}", "train.max_steps=6"]
    alone(tmp_path / "one", *cached, "train.gradient_accumulation_steps=2")
    cached.append("train.gradient_accumulation_steps=1")
    killed = together(*command(tmp_path / "killed", *cached))
    deadline = time.monotonic() + 200
    while (
        time.monotonic() < deadline and not (tmp_path / "killed" / "checkpoints" / "step-00000002").exists()
    ):
        time.sleep(0.05)
    for process in killed:
        process.terminate()
    said = [process.communicate(timeout=300) for process in killed]
    assert all(process.returncode for process in killed), said
    for name in ("two", "killed"):
        done = run_together(*command(tmp_path / name, *cached))
        assert done.returncode == 0 and ("teacher: reusing" in done.stdout) is (name == "killed"), done
    assert adapter_sha(tmp_path / "killed") == adapter_sha(tmp_path / "two")
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for key in ("labels_loss", "logits_loss", "valid_loss"):
        a, b = ([row[key] for row in run if key in row] for run in rows)
        assert a and a == pytest.approx(b, abs=1e-4)
    files = [sorted((tmp_path / name / "teacher").glob("*.safetensors")) for name in ("one", "two")]
    assert files[0] and [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["method: lr_qat", "method: l4q, rank: 4, warmup_steps: 1"])
def test_two_processes_train_the_same(adapter: str, tmp_path: Path) -> None:
    """Started as torchrun starts them (tests/train/test_launch.py has launchers that start it themselves)."""
    given = [f"adapter={{{adapter}}}", "train.gradient_accumulation_steps="]
    alone(tmp_path / "one", *given[:1], given[1] + "2")
    two = command(tmp_path / "two", *given[:1], given[1] + "1")
    done = run_together(*two)
    assert done.returncode == 0, done.stderr

    def losses(out: Path) -> list[float]:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(a) == len(b) == 3
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4
    one_base, two_base = (json.loads((tmp_path / name / "quant.json").read_text()) for name in ("one", "two"))
    assert one_base == two_base and any(row["error"] for row in one_base)
