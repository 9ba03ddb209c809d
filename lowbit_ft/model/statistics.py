"""Batch norms of a packed model keep the statistics of the checkpoint, in training too.

In training mode a batch norm divides by what the batch has, and moves the running means that it divides by
afterwards. Both would ship another model than was trained: the batch does not ship, and running means are no
parameter that a merge could write. So they are held in the mode of inference, where a batch norm is a scale
and a shift for each channel; these are frozen like every other dense tensor. They are not folded into the
packed weights: the scale would move the rows of codes that are there, and the shift stays anyway.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Held:
    """Put before the class of a batch norm, which may be a subclass with a forward of its own."""

    def train(self: Any, mode: bool = True) -> Any:
        return super().train(False)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _held(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Held{kind.__name__}", (Held, kind), {})


def hold_statistics(model: nn.Module) -> int:
    """Hold every batch norm of the model that has running means; how many there are. Those that have none
    divide by the batch in inference too, and stay."""
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    found = [module for module in found if module.track_running_stats]
    for module in found:
        if not isinstance(module, Held):
            module.__class__ = _held(type(module))
        module.eval()
    return len(found)
