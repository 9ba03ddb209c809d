"""The validation loss of a run, and the step that it chooses.

Measured is the mean token loss, whatever a run learns from; of one that learns from pairs, its own loss and
what is told beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.upload import upload
from .log import TrainLog
from .losses import measure_of
from .setup import StopSignal, TrainError

if TYPE_CHECKING:
    from .run import Run


@torch.no_grad()
def evaluate(run: Run, log: TrainLog, stop: StopSignal) -> None:
    """What is measured, its mean over one pass of the validation data. After a signal the resumed run does
    it."""
    if run.valid is None:
        return
    run.model.eval()
    lesson = measure_of(run.lesson)
    goals = torch.zeros(len(lesson.parts), dtype=torch.float64)
    total = upload(torch.zeros_like(goals), run.accelerator.device)
    for batch in _in_step(run, run.valid.one_epoch()):
        if stop.requested and run.accelerator.num_processes == 1:
            break  # several processes would have to agree on the batch, so they finish instead
        total += run.loss(batch, measured=True)
        goals += run.goal.counts(lesson, batch)
    else:
        numbers = run.sum(*total, *goals)
        sums, counts = numbers[: len(goals)], numbers[len(goals) :]
        if not max(counts):
            raise TrainError("the validation data has no target tokens; see data.valid and data.train_on")
        means = [part / max(1, count) for part, count in zip(sums, counts, strict=True)]
        loss = lesson.joined(means)
        _count(run, loss)
        told = {f"valid_{k}": v if math.isfinite(v) else None for k, v in lesson.told(means).items()}
        log.line({"step": run.now.step, "valid_loss": run.now.valid_loss, **told})
        log.note(f"step {run.now.step}: validation loss {loss:.4f}{log.shown(told)}")
        run.track({"step": run.now.step, "valid_loss": loss, **told})
    run.model.train()


def _count(run: Run, loss: float) -> None:
    now = run.now
    now.evaluated, now.valid_loss = now.step, loss if math.isfinite(loss) else None
    if not run.section.keep_best or now.step <= max(run.choose_after, run.pruned_at):
        return
    if math.isfinite(loss) and (now.best_loss is None or loss < now.best_loss):
        now.best_step, now.best_loss, now.without_gain = now.step, loss, 0
    else:
        now.without_gain += 1


def no_gain(run: Run) -> bool:
    """Whether train.stop_after evaluations in a row have not been the best."""
    most = run.section.stop_after
    return most is not None and run.now.without_gain >= most


def _in_step(run: Run, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The batches; sharded processes, which must run as many forwards as each other, fill up with a token
    that is no target.
    """
    nothing = {
        "input_ids": torch.zeros(1, 1, dtype=torch.long),
        "position_ids": torch.zeros(1, 1, dtype=torch.long),
    }
    nothing["labels"] = torch.full((1, 1), -100)
    while True:
        batch = next(batches, None)
        go_on = batch is not None
        if not (run.agree(go_on) if run.sharded else go_on):
            return
        yield nothing if batch is None else batch


def keep_best(run: Run, stopped: bool, log: TrainLog) -> None:
    """At the end of a run with keep_best, the model gets the weights of the lowest validation loss."""
    best = run.now.best_step
    if not stopped and run.section.keep_best and best is not None and best != run.now.step:
        run.load_weights(run.checkpoints.read(best))
        if run.now.step < run.total:
            log.note(f"step {run.now.step}: {run.now.without_gain} evaluations without gain, the run ends")
        log.note(f"kept step {best}: validation loss {run.now.best_loss:.4f}, the lowest")
