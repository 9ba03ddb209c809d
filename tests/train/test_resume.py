"""A run is never lost: stopped by a signal, crashed or killed, it goes on bit-equal."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.train.setup import TrainError
from tests.forks import Forked
from tests.loop_tools import (
    digest,
    go,
    lines,
    losses,
    stop_at,
)
from tests.toy import Toy, batches, equal, state


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw", "paged_adamw8bit", "lion32bit", "ademamix8bit"])
def test_optimizers_resume_bit_equal(name: str, tmp_path: Path) -> None:
    straight, _ = go(tmp_path / "a", optimizer=name, max_steps=4)
    go(tmp_path / "b", optimizer=name, max_steps=4, on_step=stop_at(2))
    resumed, result = go(tmp_path / "b", Toy(start=9), optimizer=name, max_steps=4, resume=True)
    assert result.steps == 4 and equal(state(straight), state(resumed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_signal_finishes_the_step_saves_and_resumes_bit_equal(at: int, number: int, tmp_path: Path) -> None:
    setting: dict[str, Any] = {"eval_every": 3, "valid": batches(seed=1)}
    handler = signal.getsignal(number)
    straight, _ = go(tmp_path / "a", Toy(dropout=0.3), **setting)
    _, result = go(tmp_path / "b", Toy(dropout=0.3), on_step=stop_at(at, number), **setting)
    assert result.stopped and result.steps == at + 1 and signal.getsignal(number) is handler
    resumed, result = go(tmp_path / "b", Toy(start=9, dropout=0.3), resume=True, **setting)
    assert result.steps == 8 and not result.stopped
    assert equal(state(straight), state(resumed)) and digest(tmp_path / "a", 8) == digest(tmp_path / "b", 8)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert lines(tmp_path / "a", "valid_loss") == lines(tmp_path / "b", "valid_loss")


def test_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice(_: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # SIG_IGN where the tests run in the background of a shell
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, on_step=twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_during_evaluation_leaves_it_to_the_resumed_run(tmp_path: Path) -> None:
    class Slow:
        def one_epoch(self) -> Any:
            for batch in batches(seed=1).one_epoch():
                os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    _, result = go(tmp_path, valid=Slow(), eval_every=2, keep_best=True)
    assert result.stopped and result.steps == 2 and not lines(tmp_path, "valid_loss")
    _, result = go(tmp_path, valid=batches(seed=1), eval_every=2, keep_best=True, resume=True)
    assert [row["step"] for row in lines(tmp_path, "valid_loss")] == [2, 4, 6, 8]


class Crash(Exception):
    pass


@pytest.mark.parametrize("at", [2, 5, 6])
def test_crash_resumes_from_the_last_checkpoint_bit_equal(at: int, tmp_path: Path) -> None:
    def crash(now: int) -> None:
        if now == at:
            raise Crash

    straight, _ = go(tmp_path / "a", Toy(dropout=0.3), save_every=2)
    with pytest.raises(Crash):
        go(tmp_path / "b", Toy(dropout=0.3), save_every=2, on_step=crash)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # half a line, as a kill leaves it
    (tmp_path / "b" / "checkpoints" / ".step-00000008.lowbit_ft-0123456789abcdef.partial").mkdir()
    resumed, _ = go(tmp_path / "b", Toy(start=9, dropout=0.3), save_every=2, resume=True)
    assert equal(state(straight), state(resumed)) and losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [row["step"] for row in lines(tmp_path / "b")] == list(range(1, 9))
    assert not list((tmp_path / "b" / "checkpoints").glob(".*"))


def test_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    straight, _ = go(tmp_path / "a", save_every=2)
    go(tmp_path / "b", save_every=2)
    file = tmp_path / "b" / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-00000008/optimizer\.safetensors: expected \d+ bytes"):
        resumed, _ = go(tmp_path / "b", Toy(start=9), save_every=2, resume=True)
    assert equal(state(straight), state(resumed)) and digest(tmp_path / "a", 8) == digest(tmp_path / "b", 8)


def test_resume_of_a_finished_run_and_of_nothing(tmp_path: Path) -> None:
    model, first = go(tmp_path, valid=batches(seed=1), resume=True)  # nothing there yet: begins
    again, second = go(tmp_path, Toy(start=9), valid=batches(seed=1), resume=True)
    assert equal(state(model), state(again)) and len(losses(tmp_path)) == 8
    assert (first.steps, first.final_loss, first.valid_loss) == (
        second.steps,
        second.final_loss,
        second.valid_loss,
    )


def test_real_sigkill_resumes_to_the_same_file(tmp_path: Path) -> None:
    process = Forked([__file__, tmp_path / "b"])
    metrics = tmp_path / "b" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 15):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(losses(tmp_path / "b")) < 150
    killed(tmp_path / "b", resume=True)
    killed(tmp_path / "a", resume=False)
    assert digest(tmp_path / "a", 150) == digest(tmp_path / "b", 150)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def killed(run_dir: Path, resume: bool) -> None:
    def slow(_: int) -> None:
        if not resume and __name__ == "__main__":
            time.sleep(0.005)

    go(run_dir, Toy(dropout=0.3), max_steps=150, save_every=10, resume=resume, on_step=slow)


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    go(tmp_path, max_steps=1)
    before = digest(tmp_path, 1)
    with pytest.raises(
        TrainError, match=r"has checkpoints of an earlier run \(up to step 1\).*resume it, or choose"
    ):
        go(tmp_path, max_steps=1)
    assert digest(tmp_path, 1) == before and len(losses(tmp_path)) == 1


def test_resume_with_another_base_optimizer_or_adapter_is_refused(tmp_path: Path) -> None:
    go(tmp_path, max_steps=1, meta={"base": "abc"})
    with pytest.raises(TrainError, match="base was 'abc' and is 'xyz'"):
        go(tmp_path, max_steps=2, meta={"base": "xyz"}, resume=True)
    with pytest.raises(TrainError, match="optimizer was 'adamw' and is 'lion'"):
        go(tmp_path, max_steps=2, meta={"base": "abc"}, optimizer="lion", resume=True)
    other = Toy()
    other.A = torch.nn.Parameter(torch.zeros(5, 12))
    with pytest.raises(
        TrainError, match=r"trains other tensors \(1 differ, such as 'A': \(4, 12\) there, \(5, 12\) here"
    ):
        go(tmp_path, other, max_steps=2, meta={"base": "abc"}, resume=True)


if __name__ == "__main__":
    killed(Path(sys.argv[1]), resume=False)
