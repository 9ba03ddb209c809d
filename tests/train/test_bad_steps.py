"""Steps whose loss or gradient is no number: skipped, counted, and too many of them end the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.train.setup import TrainError, make_accelerator
from tests.loop_tools import (
    go,
    lines,
    losses,
    stop_at,
)
from tests.toy import Toy, equal, section, state


def test_steps_without_targets_are_skipped(tmp_path: Path) -> None:
    blank = Batches(Examples([Example([1, 2, 3], [-100] * 3, [3])]), 1, 0)
    with pytest.raises(TrainError, match="5 steps in a row"):
        go(tmp_path, data=blank)
    assert "no target tokens" in lines(tmp_path, "skipped")[0]["skipped"]


class Poisoned(Toy):
    """Gives NaN logits (or an infinite gradient) at the given forwards, two to a step."""

    def __init__(self, forwards: set[int], gradient: bool = False) -> None:
        super().__init__()
        self.forwards, self.gradient, self.calls = forwards, gradient, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        self.calls += self.training
        if self.calls in self.forwards and self.training:
            if self.gradient:
                out.logits.register_hook(lambda g: g * math.inf)
            else:
                out.logits = out.logits * math.nan
        return out


@pytest.mark.parametrize("gradient", [False, True])
def test_bad_step_is_skipped_and_counted(gradient: bool, tmp_path: Path) -> None:
    before: dict[int, Any] = {}
    model = Poisoned({5}, gradient)  # the first micro-batch of the third step
    _, result = go(tmp_path, model, on_step=lambda step: before.update({step: state(model)}))
    assert result.bad_steps == 1 and result.steps == 8
    assert equal(before[2], before[3]) and not equal(before[3], before[4])
    (row,) = lines(tmp_path, "skipped")
    assert row["step"] == 3 and ("gradient norm" if gradient else "loss is nan") in row["skipped"]
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 4, 5, 6, 7, 8]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bad_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        TrainError, match=r"3 steps in a row .*\(up to step 5\).*checkpoints/step-00000004\. Lower"
    ):
        go(tmp_path / "a", Poisoned(set(range(5, 99))), max_bad_steps=3, save_every=2)
    assert len(lines(tmp_path / "a", "skipped")) == 3
    with pytest.raises(TrainError, match=r"No checkpoint was written yet \(see train.save_every\)"):
        go(tmp_path / "b", Poisoned(set(range(1, 99))), max_bad_steps=3)
    good, _ = go(tmp_path / "c", max_bad_steps=3)  # a signal handler or a hook left behind would show here
    assert all(torch.isfinite(p).all() for p in good.parameters())


def test_loss_scaler_searches_its_scale_and_is_resumed(tmp_path: Path) -> None:
    """fp16 needs a GPU, its scaler does not: a scale that overflows is not counted as a bad run, and it is
    saved.
    """

    def scaled() -> Accelerator:
        accelerator = make_accelerator(section(), tmp_path, Toy())
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
        return accelerator

    setting: dict[str, Any] = {"max_bad_steps": 1, "max_steps": 12}
    straight, result = go(tmp_path / "a", accelerator=scaled(), **setting)
    assert 0 < result.bad_steps < 8 and not equal(state(straight), state(Toy()))
    assert all("gradient norm" in row["skipped"] for row in lines(tmp_path / "a", "skipped"))
    go(tmp_path / "b", accelerator=scaled(), on_step=stop_at(6), **setting)
    resumed, _ = go(tmp_path / "b", Toy(start=9), accelerator=scaled(), resume=True, **setting)
    assert equal(state(straight), state(resumed)) and losses(tmp_path / "a") == losses(tmp_path / "b")
    with pytest.raises(TrainError, match="fp16 needs a GPU"):
        go(tmp_path / "c", mixed_precision="fp16")
