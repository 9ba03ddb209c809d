"""Training on each signal and teacher: with all that a step can be done by, resumed bit-equal, refused with
another teacher; and the teachers themselves.
"""

from __future__ import annotations

import json
import os
import signal as signals
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.data.batches import Batches
from lowbit_ft.model.heads import resting
from lowbit_ft.model.unrounded import unrounded
from lowbit_ft.signals import SIGNALS
from lowbit_ft.train import prepare
from lowbit_ft.train.setup import TrainError
from tests.signals.common import ASKING, OPTIONS, PAIRS, STEPS, go, lesson, student, windows

TEACHERS = ["residual", "other"]


def lines(folder: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def stop_at(step: int) -> Any:
    return lambda now: os.kill(os.getpid(), signals.SIGTERM) if now == step else None


def run(
    folder: Path, kind: str = "mix", teacher: str = "residual", **changes: Any
) -> dict[str, torch.Tensor]:
    model = student()
    go(folder, model, lesson(kind, model, teacher, **OPTIONS[kind]), **changes)
    return trained(model)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_stopped_run_goes_on_bit_equal(kind: str, teacher: str, tmp_path: Path) -> None:
    if not SIGNALS[kind].asks and teacher != TEACHERS[0]:
        return  # one run of a signal that asks nobody
    straight = run(tmp_path / "a", kind, teacher)
    run(tmp_path / "b", kind, teacher, on_step=stop_at(1))
    assert len(lines(tmp_path / "b")) == 2
    model = student(start=3)
    go(tmp_path / "b", model, lesson(kind, model, teacher, **OPTIONS[kind]), resume=True)
    resumed = trained(model)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight) and len(straight) > 20
    assert lines(tmp_path / "a") == lines(tmp_path / "b") and len(lines(tmp_path / "a")) == STEPS
    assert lines(tmp_path / "a", "valid_loss") == lines(tmp_path / "b", "valid_loss")


def test_another_teacher_or_signal_is_refused_on_resume(tmp_path: Path) -> None:
    run(tmp_path, "mix", "other", on_step=stop_at(1))
    model = student()
    with pytest.raises(TrainError, match="signal was .*another.*residual"):
        go(tmp_path, model, lesson("mix", model, "residual", **OPTIONS["mix"]), resume=True)
    with pytest.raises(TrainError, match="signal was .*'kind': 'mix'.* and is None"):
        go(tmp_path, model, lesson("labels", model), resume=True)
    with pytest.raises(TrainError, match="temperature"):
        go(
            tmp_path,
            model,
            lesson("mix", model, "other", **OPTIONS["mix"] | {"temperature": 1.0}),
            resume=True,
        )


@pytest.mark.parametrize("teacher", TEACHERS)
def test_how_a_step_is_done_changes_nothing(teacher: str, tmp_path: Path) -> None:
    """Recomputation, offload, kept codes and MLPs in chunks are the plain run, bit for bit; whole logits and
    bf16 are its numbers."""
    plain = run(tmp_path / "plain", teacher=teacher)
    ways: dict[str, dict[str, Any]] = {
        "recomputed": {"gradient_checkpointing": True},
        "offloaded": {"gradient_checkpointing": True, "offload": "disk"},
        "kept": {"keep_codes": True},
    }
    for name, changes in ways.items():
        found = run(tmp_path / name, teacher=teacher, **changes)
        assert lines(tmp_path / name) == lines(tmp_path / "plain")
        assert all(torch.equal(found[n], plain[n]) for n in plain), name
    near: dict[str, tuple[dict[str, Any], float]] = {
        "whole": ({"chunks": False}, 1e-4),
        "mlps": ({"mlp_chunk": 16, "gradient_checkpointing": True}, 1e-4),
        "bf16": ({"mixed_precision": "bf16"}, 0.05),
    }
    for name, (changes, tolerance) in near.items():
        run(tmp_path / name, teacher=teacher, **changes)
        for key in ("loss", "labels_loss", "logits_loss"):
            want = lines(tmp_path / "plain", key)
            assert lines(tmp_path / name, key) == pytest.approx(want, rel=tolerance, abs=tolerance / 10), name


@pytest.mark.slow
def test_compiled_layers_and_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's forward, without gradient and in eval mode, is the plain one. Which forwards are compiled
    is the same for every backend; this one needs no C++ compiler, and no time for it."""
    monkeypatch.setattr(prepare, "compile_layers", partial(prepare.compile_layers, backend="eager"))
    run(tmp_path / "plain")
    run(tmp_path / "compiled", compile=True)
    assert lines(tmp_path / "compiled") == pytest.approx(lines(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("kind", ASKING)
def test_the_parts_are_told_and_make_the_loss(kind: str, tmp_path: Path) -> None:
    model = student()
    mine = lesson(kind, model, **OPTIONS[kind])
    go(tmp_path, model, mine)
    if len(mine.parts) == 1:
        assert not lines(tmp_path, "logits_loss")
        return
    parts = [lines(tmp_path, f"{name}_loss") for name in mine.parts]
    for loss, *each in zip(lines(tmp_path), *parts, strict=True):
        assert loss == pytest.approx(mine.joined(each), rel=1e-12) and min(each) >= 0 < each[0]


def test_the_validation_loss_is_that_of_the_labels(tmp_path: Path) -> None:
    """Whatever is learned from, but pairs: with a learning rate of nearly nothing all measure the same."""
    found = []
    for kind in SIGNALS.keys() - PAIRS:
        run(tmp_path / kind, kind, learning_rate=1e-12)
        found.append(lines(tmp_path / kind, "valid_loss"))
    assert all(row == pytest.approx(found[0], rel=1e-5) for row in found) and len(found[0]) == 2


def test_students_come_nearer_to_their_teacher(tmp_path: Path) -> None:
    """The divergence from the residual teacher, measured by hand on the training windows, falls."""
    model = student()
    (batch,) = list(Batches(windows(), 9, 0).one_epoch())
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}

    def apart() -> float:
        with torch.no_grad(), resting(model):
            ours = model(**inputs, use_cache=False).logits.log_softmax(-1)
            with unrounded(model):
                theirs = model(**inputs, use_cache=False).logits.log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    before = apart()
    go(
        tmp_path,
        model,
        lesson("logits", model, on="all"),
        max_steps=30,
        learning_rate=0.02,
        max_grad_norm=10.0,
    )
    assert apart() < 0.9 * before  # scales of either sign start a third nearer than one sign did
    assert lines(tmp_path)[-1] < 0.8 * lines(tmp_path)[0]


def test_the_teacher_takes_no_gradient_and_leaves_modes_and_layers_as_they_were(tmp_path: Path) -> None:
    model = student()
    mine = lesson("logits", model, "other")
    assert mine.teacher is not None
    other = mine.teacher.model()
    assert other is not None
    before = {n: p.clone() for n, p in other[0].named_parameters()}
    go(tmp_path, model, mine)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in other[0].named_parameters())
    assert not any(getattr(layer, "unrounded", False) for layer in model.modules())
    assert "forward" not in vars(model) and "forward" not in vars(other[0])
