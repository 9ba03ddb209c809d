"""descend: steps on windows of text that keep the best state seen. signround rounds by it, train.reconstruct
(train/reconstruct.py) fits adapters by it.

One batch a step, in an order drawn from the seed; rates fall linearly to zero. The loss over the same few
batches (CHECKED, spread evenly) is looked at before, CHECKS times on the way and at the end: a batch's own
loss says more about the batch than about the step, and all of them cost a third of the whole descent. What is
left in the tensors is the best of these states, so that loss never ends above its start.
"""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

CHECKS = 4
CHECKED = 8  # batches that a check looks at, at most


class Text(Protocol):
    """What is minimised."""

    @property
    def batches(self) -> int: ...

    def loss(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Of batch `number`, a scalar with a gradient. generator: of a step, for what is drawn in it."""
        ...

    def whole(self) -> float:
        """Over the batches that a check looks at (`checked`), without a gradient."""
        ...


def checked(batches: int) -> range:
    """The numbers of the batches that a check looks at: at most CHECKED, spread evenly."""
    return range(0, batches, math.ceil(batches / CHECKED))


def descend(
    tensors: Mapping[str, Tensor], text: Text, steps: int, seed: int, step: Callable[[float], None], what: str
) -> tuple[float, float, int]:
    """Train `tensors` in place; step(share) takes one step on their .grad at that share of its peak rates and
    clears it. Returns the loss before, the loss after, and how many steps the kept state has seen. ValueError
    naming `what` when the loss is not a number.
    """
    generator = torch.Generator().manual_seed(seed)
    before = best = text.whole()
    kept, kept_step = _copied(tensors), 0
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    order: list[int] = []
    for number in range(steps):
        if not math.isfinite(best):
            raise ValueError(
                f"{what}: the loss is {best} before the first step: check the dense model in this dtype"
            )
        order = order or torch.randperm(text.batches, generator=generator).tolist()
        with torch.enable_grad():
            text.loss(order.pop(), generator).backward()
        step(1 - number / steps)
        if number + 1 in checks and (now := text.whole()) < best:  # NaN is not
            best, kept, kept_step = now, _copied(tensors), number + 1
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
    return before, best, kept_step


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
