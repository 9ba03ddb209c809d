"""The training loop. It reads from top to bottom: `train` is the loop, everything below it is what the loop
calls.

A step is gradient_accumulation_steps micro-batches on every process. Its loss is the sum of the token
losses over the number of targets of that whole global batch, counted before the first forward (a signal may
have several such parts, each with its weight and its count: signals/), so accumulation and the number of
processes change nothing but the order of a sum. DDP averages gradients over processes, and so does FSDP
(sharding.py); multiplying by their number makes the average that sum.

A run is not lost: SIGTERM and ctrl-C finish the step, save all there is and return with stopped=True; a
kill loses the steps since the last checkpoint. `resume` goes on bit-equal: weights, optimizer, learning
rate (a function of the step), generators, data position. A step whose loss or gradient is NaN or infinite
changes nothing but the position.

The host never waits for the device within a step but once: at its end the loss, the gradient norm and what
all processes need to know of each other come in one read (`Run.read`), whatever the number of micro-batches.
(A model may wait by itself; docs/speed.md has what transformers does. With fp16 the loss scaler reads once
more.)

The model is any module that returns `.logits` for input_ids, position_ids, use_cache=False (and
attention_mask when the batch has one); what trains is what requires a gradient; only the modules that hold
such a tensor are saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from torch import nn

from ..adapters.carry import Carried, carry_rows
from ..model.linear import packed_op_only
from ..signals import Lesson
from .goal import NEXT_TOKENS, Goal
from .log import TrainLog
from .losses import LABELS
from .memory import peak_gb
from .optim import lr_factor, set_learning_rates
from .progress import why_bad
from .refusals import refuse_unreached
from .run import Run
from .setup import StopSignal, TrainBatches, ValidBatches
from .validate import evaluate, keep_best, no_gain
from .window import window_of


@dataclass(frozen=True)
class TrainResult:
    """steps done in all; tokens and seconds over all of them; losses per target token; memory in GB.

    best_step: whose weights the model has now, if keep_best chose them; stopped: by a signal, before the end.
    """

    steps: int
    tokens: int
    final_loss: float | None
    valid_loss: float | None
    best_step: int | None
    seconds: float
    peak_memory: float
    stopped: bool
    bad_steps: int


def train(
    model: nn.Module,
    batches: TrainBatches,
    valid: ValidBatches | None,
    section: Any,
    run_dir: str | Path,
    *,
    meta: dict[str, Any] | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int], Iterable[Carried] | None] | None = None,
    after_step: Callable[[], None] | None = None,
    choose_after: int = 0,
    pruned_at: int = 0,
    lesson: Lesson = LABELS,
    goal: Goal = NEXT_TOKENS,
    console: Console | None = None,
) -> TrainResult:
    """Train `model` in place by a TrainSection; checkpoints and metrics.jsonl go to `run_dir`.

    meta: what the checkpoint belongs to (JSON-able, such as the base's digest); another one is refused on
    resume. resume: go on from the newest valid checkpoint, if there is one. on_step(step): called with the
    0-based step before its forward (what it returns says which rows an optimizer's averages follow:
    adapters/carry.py), and on resume with the last step done before its tensors are read: what
    on_step keeps beside them is then as it was, what it writes to them is replaced. after_step: called when
    a step is computed, before it counts or is saved; what it raises ends the run at the last checkpoint.
    choose_after: steps of a warm-up that trains another model than the one that ships (l4q's warmup_steps):
    evaluations up to that step never become the best, the scale group waits until then, and the run must be
    longer. pruned_at: the step before which the last zeros come: evaluations up to it are of a model with
    fewer, and never become the best. lesson: what the loss is made of (signals/); with a teacher, what it
    says of itself belongs to the checkpoint. goal: how a batch becomes a loss (goal.py). Raises TrainError,
    or ValueError from the section's names.
    """
    run = Run(
        model, batches, valid, section, Path(run_dir), meta or {}, accelerator, choose_after, lesson, goal
    )
    run.pruned_at = pruned_at
    run.after_step = after_step
    try:
        run.start(resume, on_step)
        stopped = _loop(run, batches, section, on_step, console)
        return _result(run, stopped)
    finally:
        run.release()


def _loop(
    run: Run,
    batches: TrainBatches,
    section: Any,
    on_step: Callable[[int], Iterable[Carried] | None] | None,
    console: Console | None,
) -> bool:
    """The steps from where `run` is to the end; whether a signal stopped it."""
    now, total, accelerator, lesson = run.now, run.total, run.accelerator, run.lesson
    with (
        StopSignal() as stop,
        TrainLog(run.run_dir, now.step, now.evaluated, total, run.main, console, run.goal.pace) as log,
    ):
        told: bool | None = None  # whether a signal had reached any process when the last step ended
        while True:
            # 1. Between steps: evaluate, save, leave.
            if run.is_due(section.eval_every) and now.evaluated < now.step:
                with packed_op_only(run.model):  # as training's forwards: a run's numbers are of one op
                    evaluate(run, log, stop)
            stopped = run.agree(stop.requested) if told is None or accelerator.num_processes == 1 else told
            over = now.step >= total or no_gain(run)
            if stopped or over or run.is_due(section.save_every) or now.best_step == now.step:
                run.save()
            if stopped or over:
                keep_best(run, stopped, log)
                return stopped

            # 2. The data of this step, and how many targets all processes together have.
            began = time.perf_counter()
            if on_step is not None:
                carried = list(on_step(now.step) or ())
                carry_rows(run.raw_optimizer, carried)
                run.gradient.carry(carried)
            rates = set_learning_rates(run.raw_optimizer, lr_factor(section, now.step, total))
            micro = [next(batches) for _ in range(section.gradient_accumulation_steps)]
            counts = run.counts(micro)
            tokens = sum(run.goal.pace.count(batch) for batch in micro)

            # 3. Gradients of (sum of losses) / positions, of each part of the loss by its weight.
            window = window_of(run, micro, counts)
            sums = run.gradient.fill(window)
            if now.step in (0, lesson.free_from(total)):
                refuse_unreached(run.learning)
            run.drop_idle_gradients()
            norm = run.clip()
            parts, norm, targets, tokens, told = run.read(sums, norm, counts, tokens, stop.requested)
            loss = lesson.joined(parts)

            # 4. The step, unless something is not a number.
            bad = why_bad(loss, norm, targets)
            # The fp16 loss scaler must see its overflows to adapt; it skips the step by itself.
            if bad is None or (run.scaler is not None and targets):
                run.optimizer.step()
                if not run.optimizer.step_was_skipped:
                    run.gradient.after_step(window, rates)
            run.optimizer.zero_grad()
            seconds = time.perf_counter() - began
            run.count(bad, loss, tokens, seconds)

            # 5. Tell.
            values = (
                {"step": now.step, "skipped": bad}
                if bad
                else {
                    "step": now.step,
                    "loss": loss,
                    **lesson.told(parts),
                    **rates,
                    "grad_norm": norm,
                    **run.goal.pace.told(tokens, now.tokens, seconds),
                    "memory_gb": peak_gb(accelerator.device),
                    "seconds": now.seconds,
                }
            )
            if bad or now.step % section.log_every == 0 or now.step == total:
                log.line(values)
                run.track(values)
            log.show(values)
            run.give_up_if_bad()


def _result(run: Run, stopped: bool) -> TrainResult:
    now, best = run.now, None if stopped or not run.section.keep_best else run.now.best_step
    return TrainResult(
        steps=now.step,
        tokens=now.tokens,
        final_loss=now.loss,
        valid_loss=now.valid_loss if best is None else now.best_loss,
        best_step=best,
        seconds=now.seconds,
        peak_memory=peak_gb(run.accelerator.device),
        stopped=stopped,
        bad_steps=now.bad_steps,
    )
