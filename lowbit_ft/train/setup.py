"""What a training run is set up with: the accelerator, signals, the number of steps, and what it needs of its
data.
"""

from __future__ import annotations

import math
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from .log import check_trackers
from .offload import Offload
from .processes import world


class TrainError(ValueError):
    """Training cannot start, go on or be resumed; the message says why and what to do."""


class TrainBatches(Protocol):
    """What the loop needs of lowbit_ft.data.Batches."""

    def __next__(self) -> dict[str, Tensor]: ...
    def __len__(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ValidBatches(Protocol):
    """What evaluation needs of lowbit_ft.data.Batches: this process's share of one pass."""

    def one_epoch(self) -> Iterator[dict[str, Tensor]]: ...


class StopSignal:
    """SIGTERM and ctrl-C set `requested` while the block runs; a second ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread: signals are somebody else's there
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def total_steps(section: Any, batches: TrainBatches, choose_after: int = 0) -> int:
    """Optimizer steps of a run: max_steps, or epochs x micro-batches per epoch and process / accumulation,
    rounded up. TrainError when a warm-up of choose_after steps leaves none of them.
    """
    total = section.max_steps
    if total is None:
        total = max(1, math.ceil(section.epochs * len(batches) / section.gradient_accumulation_steps))
    if choose_after >= total:
        raise TrainError(
            f"adapter.warmup_steps: got {choose_after}, but the run has {total} steps, so the model that "
            "ships would "
            "never be trained; lower it, or raise train.max_steps or train.epochs"
        )
    return total


def make_accelerator(section: Any, run_dir: Path, model: nn.Module) -> Accelerator:
    """An Accelerator for the section, on the kind of device the model is on.

    accelerate keeps its settings in process-wide singletons and refuses to change them; a second run in the
    same process (two recipes, a notebook, tests) may want others, so they are reset. A process group is
    left alone.
    """
    check_trackers(section.trackers)
    cpu = next(model.parameters()).device.type == "cpu"
    if cpu and section.mixed_precision == "fp16":  # accelerate would train in full precision and say nothing
        raise TrainError("train.mixed_precision: fp16 needs a GPU; use 'bf16' or 'no' on a CPU")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not distributed)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=section.mixed_precision,
        log_with=list(section.trackers) or None,
        project_dir=run_dir / "trackers" if section.trackers else None,
        # Buffers are the packed base: the same everywhere and never changed, so not sent around at every
        # forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    used, count = accelerator.distributed_type, accelerator.num_processes
    plain = used.name.startswith("MULTI_") or (used == DistributedType.NO and count == 1)
    if not plain or count != world():
        raise TrainError(
            f"accelerate has set up {used.name} with {count} processes, and {world()} were launched. "
            "Launch with torchrun or with a "
            "plain multi-GPU configuration (docs/many-gpus.md) and choose train.sharding in the recipe: "
            "accelerate's own FSDP and "
            "DeepSpeed settings do not know packed integers"
        )
    return accelerator


def share_frozen(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave frozen parameters alone. It would write rank 0's over everybody's
    at its start: they are the same already, read from one base/, and may be pages of its files, which each
    process would then copy.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def activation_checkpointing(model: Any, on: bool, offload: Offload | None = None) -> None:
    """Switch recomputation on or off; transformers renamed the methods in 5.2x and warns about the old names.

    offload: where what is kept for it, the input of every layer, waits for the backward; None: where it is.
    """
    verb = "enable" if on else "disable"
    new = getattr(model, f"activation_checkpointing_{verb}", None)
    (new or getattr(model, f"gradient_checkpointing_{verb}"))()
    if on and hasattr(model, "disable_input_require_grads"):
        # They also make the embedding's output require a gradient, for the reentrant kind; it costs a
        # backward into the first layer and would stay after training.
        model.disable_input_require_grads()
    if on and offload is not None:
        for module in model.modules():
            if recompute := vars(module).get("_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = offload.wrap(recompute)
