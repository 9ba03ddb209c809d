"""What makes the gradient of a step: Window, Making and Gradient.

The loop hands over the micro-batches of one optimizer step as a Window: how their loss is computed, what its
parts are multiplied with, how numbers are added over the processes. A Gradient leaves .grad on the tensors
that it trains, the same on every process, and returns the sums of the parts of the loss for the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.carry import Carried


@dataclass(frozen=True)
class Window:
    """One optimizer step. step: 0-based; size: micro-batches of this process.

    loss(i): the sums of the parts of the loss over micro-batch i [parts], with gradients where they are on;
    factors fp64 [parts]: what each sum is multiplied with, so that the mean over the processes is the loss of
    the step; backward(scalar); alone(i): a context in which the backward of micro-batch i is not added over
    the processes (the last one's is); mean(t): the mean over the processes, fp64. Nothing here makes the host
    wait for the device.
    """

    step: int
    size: int
    factors: Tensor
    loss: Callable[[int], Tensor]
    backward: Callable[[Tensor], None]
    alone: Callable[[int], AbstractContextManager[Any]]
    mean: Callable[[Tensor], Tensor]

    def objective(self, sums: Tensor) -> Tensor:
        """The loss of the step, fp64 scalar on the device, of the sums [parts] of this process."""
        return (self.mean(sums) * self.factors).sum()


@dataclass(frozen=True)
class Making:
    """What a Gradient is made of. model: adapters attached, as it will train; trained: what trains, by name;
    total: steps of the run; seed: of the run; rate(step): the learning rate of A and B in that step."""

    model: nn.Module
    trained: dict[str, nn.Parameter]
    total: int
    seed: int
    rate: Callable[[int], float]


class Gradient:
    """A member at work, of one run."""

    def fill(self, window: Window) -> Tensor:
        """Leave .grad on what trains; the sums of the parts of the loss [parts] fp64 of this process."""
        raise AssertionError(f"{type(self).__name__} must define fill")

    def after_step(self, window: Window, rates: dict[str, float]) -> None:
        """Behind a step that was taken, gradients still there. rates: those of the step, as in the log: lr of
        A and B, scale_lr."""

    def carry(self, carried: Iterable[Carried]) -> None:
        """Rows of what trains lie elsewhere now: what is kept between the steps follows them."""

    def state(self) -> dict[str, Tensor]:
        """What a resume needs that is no function of the step: by name, for the checkpoint."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        assert not state, f"{type(self).__name__} keeps nothing"


def zeros(window: Window) -> Tensor:
    """Sums of no micro-batch yet."""
    return torch.zeros_like(window.factors)
