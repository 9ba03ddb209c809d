"""Which weights a run ends with: keep_best, and a warm-up of another model than the one that ships (l4q)."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.adapters.attach import adapted_layers
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.train.losses import count_targets, next_token_loss
from lowbit_ft.train.setup import TrainError
from tests.loop_tools import (
    WARMUP,
    Warming,
    all_tensors,
    digest,
    go,
    lines,
    losses,
    warm,
)
from tests.toy import VOCABULARY, Toy, batches, equal, state


def test_keep_best_needs_validation_and_something_must_train(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="keep_best needs validation data"):
        go(tmp_path, keep_best=True)
    with pytest.raises(ValueError, match="nothing to train"):
        go(tmp_path, Toy().requires_grad_(False))
    assert not (tmp_path / "checkpoints").exists()


def test_validation_without_targets_is_refused(tmp_path: Path) -> None:
    blank = Batches(Examples([Example([1, 2, 3], [-100] * 3, [3])]), 1, 0)
    with pytest.raises(TrainError, match="validation data has no target tokens"):
        go(tmp_path, valid=blank)


def test_keep_best_ships_the_lowest_validation_loss(tmp_path: Path) -> None:
    """Random validation text is predicted worse and worse: the model must end with the weights of the best
    step.
    """
    rng = random.Random(0)
    ids = [[rng.randrange(VOCABULARY) for _ in range(9)] for _ in range(6)]
    valid = Batches(Examples([Example(row, row, [9]) for row in ids]), 2, 0)
    kept, result = go(
        tmp_path / "a",
        valid=valid,
        eval_every=1,
        keep_best=True,
        learning_rate=0.05,
        max_steps=12,
        keep_checkpoints=1,
        warmup_ratio=0,
        scheduler="constant",
    )
    table = {row["step"]: row["valid_loss"] for row in lines(tmp_path / "a", "valid_loss")}
    best = min(table, key=lambda step: table[step])
    assert best != 12, "this test needs a best step that is not the last"
    assert result.best_step == best and result.valid_loss == table[best]
    loss = targets = 0.0
    with torch.no_grad():
        for batch in valid.one_epoch():
            labels = batch.pop("labels")
            loss += float(next_token_loss(kept(**batch, use_cache=False).logits, labels))
            targets += count_targets(labels)
    assert loss / targets == table[best]
    names = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == [f"step-{best:08d}", "step-00000012"]
    again, result = go(
        tmp_path / "a",
        Toy(start=9),
        valid=valid,
        eval_every=1,
        keep_best=True,
        learning_rate=0.05,
        max_steps=12,
        resume=True,
    )
    assert result.best_step == best and equal(state(kept), state(again))


def test_a_run_ends_after_evaluations_without_gain(tmp_path: Path) -> None:
    """The best is kept; stopped by a signal between two evaluations, the run ends at the same step with the
    same bits, and the same command again trains nothing more."""
    rng = random.Random(0)
    ids = [[rng.randrange(VOCABULARY) for _ in range(9)] for _ in range(6)]

    def run(folder: Path, **changes: Any) -> tuple[Any, Any]:
        valid = Batches(Examples([Example(row, row, [9]) for row in ids]), 2, 0)
        setting = {"keep_best": True, "learning_rate": 0.05, "max_steps": 30, "stop_after": 3}
        return go(folder, valid=valid, eval_every=2, **(setting | changes))

    straight, result = run(tmp_path / "a")
    valids = [line["valid_loss"] for line in lines(tmp_path / "a", "valid_loss")]
    best = valids.index(min(valids))
    assert len(valids) == best + 1 + 3 and result.steps == 2 * len(valids) < 30
    assert result.best_step == 2 * (best + 1) and not result.stopped
    at = result.steps - 3
    run(tmp_path / "b", on_step=lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == at else None)
    for _ in range(2):
        again, resumed = run(tmp_path / "b", resume=True)
        assert (resumed.steps, resumed.best_step) == (result.steps, result.best_step)
        assert equal(state(straight), state(again))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_warm_up_step_is_never_the_best(tmp_path: Path) -> None:
    model = Warming()

    def spoil(step: int) -> None:
        if step == 6:
            model.get_parameter("head.adapter.B").data[::2] += 3

    # steps so small that nothing makes up for the rounding
    result = warm(tmp_path, model, spoil, learning_rate=1e-5, scale_learning_rate=1e-5, keep_best=True)
    table = {row["step"]: row["valid_loss"] for row in lines(tmp_path, "valid_loss")}
    assert list(table) == list(range(1, 9))
    assert min(table, key=lambda s: table[s]) <= WARMUP, "this test needs an unrounded model that is better"
    best = min((s for s in table if s > WARMUP), key=lambda s: table[s])
    assert best < 8, "this test needs a best step that is not the last"
    assert result.best_step == best and result.valid_loss == table[best]
    (_, layer), *_ = adapted_layers(model)
    assert layer.adapter is not None and not layer.adapter.warming
    shipped = layer.adapter.merge(layer.base).dequantize()
    assert torch.equal(layer(torch.eye(32)), shipped.t())


@pytest.mark.parametrize("train_scale", [True, False])
@pytest.mark.parametrize("at", [WARMUP - 1, WARMUP, WARMUP + 1, 8])
def test_resume_around_the_end_of_a_warm_up(at: int, train_scale: bool, tmp_path: Path) -> None:
    """Stopped in the evaluation after `at` steps: the resumed run evaluates the same model, and the scale
    restarts once.
    """
    options = {"train_scale": train_scale}
    straight = Warming(**options)
    restarted: list[Any] = []
    warm(
        tmp_path / "a", straight, lambda s: restarted.append(all_tensors(straight)["head.adapter.log_scale"])
    )
    assert not restarted[WARMUP - 1].any() and restarted[WARMUP].any()
    passes = 0

    class StopsAt:
        def one_epoch(self) -> Any:
            nonlocal passes
            passes += 1
            for batch in batches(seed=1).one_epoch():
                if passes == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    result = warm(tmp_path / "b", Warming(**options), valid=StopsAt())
    assert result.stopped and result.steps == at and len(lines(tmp_path / "b", "valid_loss")) == at - 1
    resumed = Warming(start=9, **options)
    assert warm(tmp_path / "b", resumed, resume=True).steps == 8
    assert lines(tmp_path / "a", "valid_loss") == lines(tmp_path / "b", "valid_loss")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert equal(all_tensors(straight), all_tensors(resumed))
    assert digest(tmp_path / "a", 8) == digest(tmp_path / "b", 8)


def test_a_run_no_longer_than_its_warm_up_is_refused(tmp_path: Path) -> None:
    said = (
        r"adapter\.warmup_steps: got 4, but the run has 4 steps.*lower it, or raise train.max_steps or "
        r"train.epochs"
    )
    with pytest.raises(TrainError, match=said):  # 7 micro-batches, 4 steps of 2
        go(tmp_path, epochs=1, choose_after=4)
    with pytest.raises(TrainError, match=said):
        go(tmp_path, max_steps=4, choose_after=4)
    assert not (tmp_path / "checkpoints").exists()
    assert go(tmp_path, max_steps=4, choose_after=3)[1].steps == 4
