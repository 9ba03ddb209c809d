"""What the loop hands to train.gradient: the micro-batches of a step as a Window, and what a Gradient is made
of; and what of a checkpoint's tensors is whose.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..gradients import Gradient, Making, Window
from .optim import lr_factor

if TYPE_CHECKING:
    from .run import Run

RNG, GRADIENT = "rng/", "gradient/"  # of a checkpoint's tensors: the generators', and those of the gradient


def gradient_of(section: Any, model: nn.Module, names: Mapping[Tensor, str], total: int) -> Gradient:
    """The gradient that the section asks for, for a model that is ready to train. names: of what trains."""
    trained = {name: cast(nn.Parameter, parameter) for parameter, name in names.items()}
    peak = section.learning_rate
    return section.gradient.make(
        Making(model, trained, total, section.seed, lambda step: peak * lr_factor(section, step, total))
    )


def window_of(run: Run, micro: list[dict[str, Tensor]], counts: Tensor) -> Window:
    """The micro-batches of a step. counts [parts]: positions that the parts of the loss count in those of all
    processes."""
    accelerator, last = run.accelerator, len(micro) - 1
    return Window(
        step=run.now.step,
        size=len(micro),
        factors=accelerator.num_processes / counts.clamp_min(1) * run.weights,
        loss=lambda i: run.loss(micro[i], micro=i),
        backward=accelerator.backward,
        alone=lambda i: accelerator.no_sync(run.wrapped) if i < last else nullcontext(),
        mean=lambda t: run.over_processes(t) / accelerator.num_processes,
    )


def split_state(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors as (the optimizer's, the generators', the gradient's)."""
    own: dict[str, dict[str, Tensor]] = {"": {}, RNG: {}, GRADIENT: {}}
    for name, tensor in tensors.items():
        prefix = next((p for p in (RNG, GRADIENT) if name.startswith(p)), "")
        own[prefix][name.removeprefix(prefix)] = tensor
    return own[""], own[RNG], own[GRADIENT]
