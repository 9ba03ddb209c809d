"""What the training loop (loop.py) calls: the arithmetic of a step over all processes, saving and resuming.

Three parts have files of their own: what is changed on the model while it trains (prepare.py), where the run
is (progress.py), and the validation loss (validate.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..adapters.attach import resize, settle
from ..gradients import BackpropConfig
from ..model.shards import is_sharded, part_like, whole
from ..model.upload import upload
from ..signals import Lesson
from .checkpoint import Checkpoints, Saved, rng_state, saved_tensors, set_rng_state
from .goal import NEXT_TOKENS, Goal
from .losses import LABELS
from .optim import build_optimizer, load_optimizer_state, optimizer_state
from .prepare import Prepared
from .processes import world
from .progress import Progress
from .refusals import master_of, refuse
from .setup import (
    TrainBatches,
    TrainError,
    ValidBatches,
    make_accelerator,
    total_steps,
)
from .window import GRADIENT, RNG, gradient_of, split_state


class Run:
    """The state of one run and the operations of the loop."""

    def __init__(
        self,
        model: nn.Module,
        batches: TrainBatches,
        valid: ValidBatches | None,
        section: Any,
        run_dir: Path,
        meta: dict[str, Any],
        accelerator: Accelerator | None,
        choose_after: int = 0,
        lesson: Lesson = LABELS,
        goal: Goal = NEXT_TOKENS,
    ) -> None:
        self.lesson, self.goal = lesson, goal
        self.sharded = is_sharded(model)
        refuse(section, model, valid, self.sharded)
        self.model, self.batches, self.valid, self.section = model, batches, valid, section
        self.run_dir, self.now = run_dir, Progress()
        self.pruned_at = 0
        self.choose_after, self.total = choose_after, total_steps(section, batches, choose_after)
        windows = section.micro_batch_size * section.gradient_accumulation_steps * world()
        self.meta = {"optimizer": section.optimizer, "windows per step": windows, **meta}
        if lesson.teacher is not None:
            self.meta["signal"] = {**_plain(lesson.options), **lesson.teacher.facts}
        elif lesson.signal.pairs:
            self.meta["signal"] = _plain(lesson.options)
        if section.neftune_alpha is not None:
            self.meta["neftune_alpha"] = section.neftune_alpha
        if section.gradient != BackpropConfig():
            self.meta["gradient"] = section.gradient.model_dump(mode="json")
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        # Saved: these and their neighbours in the same module, such as a scale that only the warm-up's end
        # sets.
        self.homes = list(dict.fromkeys(name.rpartition(".")[0] for name in self.names.values()))
        self.accelerator = accelerator or make_accelerator(section, run_dir, model)
        self.main, self.scaler = self.accelerator.is_main_process, self.accelerator.scaler
        self.checkpoints = Checkpoints(run_dir / "checkpoints", section.keep_checkpoints)
        self.saved_step: int | None = None
        self.after_step: Callable[[], None] | None = None
        self.raw_optimizer = build_optimizer(
            [(n, p) for n, p in model.named_parameters() if p.requires_grad], section, master_of(model)
        )
        # of the parts of the loss [parts]
        weights = torch.tensor(lesson.weights, dtype=torch.float64)
        self.weights = upload(weights, self.accelerator.device)
        self.gradient = gradient_of(section, model, self.names, self.total)
        self.prepared = Prepared(model, section, self.accelerator, run_dir, lesson, goal)
        self.wrapped: Any = self.prepared.wrapped
        self.optimizer: Any = self.accelerator.prepare_optimizer(self.raw_optimizer)

    def start(self, resume: bool, on_step: Callable[[int], Any] | None = None) -> None:
        """Seed and begin, or read the newest valid checkpoint and go on."""
        # Dropout differs between processes; the data order does not, it has its own generator.
        set_seed(self.section.seed, device_specific=True)
        if self.main:
            self.checkpoints.clean()
        if not resume and self.checkpoints.steps():
            raise TrainError(
                f"{self.checkpoints.folder}: has checkpoints of an earlier run (up to step "
                f"{self.checkpoints.steps()[-1]}); "
                "resume it, or choose another output folder"
            )
        saved = self.checkpoints.newest() if resume and self.main else None
        self.accelerator.wait_for_everyone()  # the main process has renamed what is damaged
        if resume and not self.main:
            saved = self.checkpoints.newest()
        if saved is not None:
            self.restore(saved, on_step)
        if self.section.trackers and self.main:
            config = {k: v for k, v in _plain(self.section).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("lowbit_ft", config)

    def restore(self, saved: Saved, on_step: Callable[[int], Any] | None = None) -> None:
        """Everything as it was after the step of the checkpoint."""
        state = saved.state
        differ = sorted(k for k in {*self.meta, *state["meta"]} if self.meta.get(k) != state["meta"].get(k))
        if differ:
            what = "; ".join(f"{k} was {state['meta'].get(k)!r} and is {self.meta.get(k)!r}" for k in differ)
            raise TrainError(
                f"{saved.path}: cannot resume: {what}. Use what the run began with (windows per step are "
                "micro_batch_size x "
                "gradient_accumulation_steps x processes), or another output."
            )
        progress = Progress(**state["progress"])
        # Before the weights: a step that restarts a tensor has done so already, and training went on from
        # there.
        if on_step is not None and progress.step > 0:
            on_step(progress.step - 1)
        self.load_weights(saved)
        tensors, rng, kept = split_state(saved.optimizer)
        load_optimizer_state(self.raw_optimizer, self.names, tensors, state["optimizer"])
        self.gradient.load({k: upload(v, self.accelerator.device) for k, v in kept.items()})
        rank = self.accelerator.process_index
        if rank < len(rng["cpu"]):  # with more processes than before, the new ones keep their fresh seed
            set_rng_state({k: v[rank] for k, v in rng.items()}, state["rng"], self.accelerator.device)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["data"])
        self.now = progress
        if state["total_steps"] != self.total:
            warnings.warn(
                f"the run was planned for {state['total_steps']} steps and now has {self.total}; "
                "the learning rate follows the new plan from here",
                stacklevel=2,
            )
        self.saved_step = self.now.step

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        """Copy the tensors of a checkpoint into the model, checked by name and shape."""
        resize(self.model, saved.adapter)
        ours = {name: tuple(t.shape) for name, t in saved_tensors(self.model, self.homes).items()}
        theirs = {name: tuple(t.shape) for name, t in saved.adapter.items()}
        if ours != theirs:
            differ = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
            raise TrainError(
                f"{saved.path}: cannot resume: it trains other tensors ({len(differ)} differ, such as "
                f"{differ[0]!r}: "
                f"{theirs.get(differ[0])} there, {ours.get(differ[0])} here). Use the recipe the run began "
                "with."
            )
        for name, tensor in saved_tensors(self.model, self.homes).items():
            tensor.copy_(part_like(saved.adapter[name], tensor))

    # ---------------------------------------------------------------- a step

    def loss(self, batch: dict[str, Tensor], measured: bool = False, micro: int = 0) -> Tensor:
        """The sums of the parts of the loss over a micro-batch [parts]; measured: of what is measured; micro:
        its place in the step."""
        if self.prepared.noise is not None:
            self.prepared.noise.at(self.now.step, micro)
        if not measured:
            self.lesson.at(self.now.step, self.total, self.section.seed)
        # Measuring goes not through DDP's wrapper: processes may have unequal shares.
        model = self.model if measured else self.wrapped
        asked = self.goal.asked(self.model, self.lesson, batch, self.accelerator.device, measured)
        # the model's forward is the loss since __init__
        return model(**asked)

    def counts(self, micro: list[dict[str, Tensor]]) -> Tensor:
        """How many positions each part of the loss counts in the micro-batches of all processes [parts]."""
        counts = torch.stack([self.goal.counts(self.lesson, batch) for batch in micro]).sum(0)
        return self.over_processes(counts)

    @property
    def learning(self) -> dict[Tensor, str]:
        """The names of all that trains, but of what an intervention cut off in the last forward."""
        idle = {id(parameter) for parameter in self.lesson.idle}
        return {p: name for p, name in self.names.items() if id(p) not in idle}

    def drop_idle_gradients(self) -> None:
        """In a warm-up the scale group has no gradient, nor has what an intervention cuts off, or under DDP,
        where every tensor must take part, zeros. Zeros would fill Adam's averages: its first real steps would
        then be several times too long.
        """
        for parameter in self.lesson.idle:
            parameter.grad = None
        if self.now.step < self.choose_after:
            for group in self.raw_optimizer.param_groups:
                for parameter in group["params"] if group["name"] == "scale" else ():
                    parameter.grad = None

    def clip(self) -> Tensor:
        """Clip the gradients to max_grad_norm, if they are made to be; returns their norm before, fp64, on
        the device.

        The squares are added in fp64, so that shards, however they are cut, give the factor that whole
        gradients give.
        """
        self.accelerator.unscale_gradients()
        grads = [p.grad for p in self.names if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in local if g.numel()]
        square = (
            torch.stack(norms).square().sum()
            if norms
            else torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        )
        norm = (self.over_processes(square) if self.sharded else square).sqrt()
        if not self.section.gradient.clips:
            return norm
        factor = (self.section.max_grad_norm / (norm + 1e-6)).clamp(max=1).where(norm.isfinite(), 1.0).float()
        for gradient in local:
            # 16-bit gradients must not round the factor.
            gradient.mul_(factor) if gradient.dtype == torch.float32 else gradient.copy_(
                gradient.float() * factor
            )
        return norm

    def over_processes(self, value: Tensor) -> Tensor:
        """A scalar summed over the processes, fp64 on the device; the host does not wait."""
        return self.accelerator.reduce(upload(value, self.accelerator.device).double(), "sum")  # pyright: ignore

    def read(
        self, sums: Tensor, norm: Tensor, counts: Tensor, tokens: int, stop: bool
    ) -> tuple[list[float], float, int, int, bool]:
        """(parts of the loss, each per position, norm, positions, tokens, stop) of all processes: the one
        time in a step that the host waits for the device. sums, counts [parts]; positions: of the part that
        has most."""
        mine = torch.cat([sums, sums.new_tensor([float(tokens), float(stop)])])
        everyone = self.accelerator.reduce(mine, "sum")
        numbers = torch.cat([everyone, norm[None], counts]).tolist()  # pyright: ignore
        if self.after_step is not None:  # all is computed, nothing has changed yet
            self.after_step()
        parts, (count, stops, size), goals = (
            numbers[: len(sums)],
            numbers[len(sums) : len(sums) + 3],
            numbers[len(sums) + 3 :],
        )
        means = [total / max(1, goal) for total, goal in zip(parts, goals, strict=True)]
        return means, size, int(max(goals)), int(count), stops > 0

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over the processes. The host waits: for between the steps."""
        tensor = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()  # pyright: ignore

    def agree(self, flag: bool) -> bool:
        """Whether any process says so: a signal may have reached only one of them."""
        return self.sum(flag)[0] > 0 if self.accelerator.num_processes > 1 else flag

    def count(self, bad: str | None, loss: float, tokens: int, seconds: float) -> None:
        """The step is over. bad: why it was not taken, or None."""
        # fp16 finds its loss scale by overflowing: only an overflow at scale 1 or below says that something
        # is wrong. Asking for the scale waits for the device, so only a bad step does.
        scaler = self.scaler if bad is not None and math.isfinite(loss) else None
        searching = scaler is not None and scaler.get_scale() > 1
        self.now.count(bad, loss, tokens, seconds, searching)

    def give_up_if_bad(self) -> None:
        """Raise TrainError after max_bad_steps bad steps in a row."""
        if self.now.bad_in_a_row < self.section.max_bad_steps:
            return
        good = self.checkpoints.newest_valid()
        where = (
            f"The last good checkpoint is {self.checkpoints.path(good)}"
            if good is not None
            else "No checkpoint was written yet (see train.save_every)"
        )
        raise TrainError(
            f"{self.now.bad_in_a_row} steps in a row had a loss or gradient that is NaN or infinite (up to "
            "step "
            f"{self.now.step}), so training stopped. {where}. Lower train.learning_rate or "
            "train.scale_learning_rate, "
            "or use bf16 instead of fp16."
        )

    # ---------------------------------------------------------------- between steps

    def is_due(self, every: int | None) -> bool:
        """Whether something done every so many steps, and at the end, is to be done now."""
        step = self.now.step
        return step > 0 and (step >= self.total or bool(every and step % every == 0))

    def save(self) -> None:
        """Write a full checkpoint of this moment; once per step."""
        if self.saved_step == self.now.step:
            return
        settle(self.model)
        device, now = self.accelerator.device, self.now
        rng, numbers = rng_state(device)
        every = {k: self.accelerator.gather(v[None].to(device)).cpu() for k, v in rng.items()}  # pyright: ignore
        # Shards are gathered by all: the file holds whole tensors, for any number of processes.
        if self.main or self.sharded:
            adapter = {
                n: whole(t.detach()).to("cpu", copy=True).contiguous()
                for n, t in saved_tensors(self.model, self.homes).items()
            }
            tensors, scalars = optimizer_state(self.raw_optimizer, self.names)
        else:
            adapter, tensors, scalars = {}, {}, {}
        if self.main:
            state = {
                "progress": asdict(now),
                "data": self.batches.state_dict(),
                "optimizer": scalars,
                "rng": numbers,
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "meta": self.meta,
                "total_steps": self.total,
                "processes": self.accelerator.num_processes,
            }
            tensors |= {f"{RNG}{key}": value for key, value in every.items()}
            own = {key: t.detach().to("cpu", copy=True) for key, t in self.gradient.state().items()}
            tensors |= {f"{GRADIENT}{key}": value for key, value in own.items()}
            self.checkpoints.save(now.step, adapter, tensors, state, now.best_step)
        self.saved_step = now.step
        self.accelerator.wait_for_everyone()

    def track(self, values: dict[str, Any]) -> None:
        if self.main and self.section.trackers:
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
            self.accelerator.log(numbers, step=values["step"])

    def release(self) -> None:
        """Give the model back as it came: no wrappers, no gradients, in eval mode; close the trackers."""
        for tracker in self.accelerator.trackers if self.main else []:
            tracker.finish()
        self.prepared.release()
        self.optimizer.zero_grad()


def _plain(section: Any) -> dict[str, Any]:
    return section.model_dump(mode="json") if hasattr(section, "model_dump") else dict(vars(section))
