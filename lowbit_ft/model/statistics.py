"""Batch norms of a packed model keep the statistics of the checkpoint, in training too.

In training mode a batch norm divides by what the batch has, and moves the running means that it divides by
afterwards. Both would ship another model than was trained: the batch does not ship, and running means are no
parameter that a merge could write. So they are held in the mode of inference, where a batch norm is a scale
and a shift for each channel; these are frozen like every other dense tensor. They are not folded into the
packed weights: the scale would move the rows of codes that are there, and the shift stays anyway.
"""

from __future__ import annotations

from torch import nn


class HeldBatchNorm1d(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> HeldBatchNorm1d:
        return super().train(False)


class HeldBatchNorm2d(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> HeldBatchNorm2d:
        return super().train(False)


class HeldBatchNorm3d(nn.BatchNorm3d):
    def train(self, mode: bool = True) -> HeldBatchNorm3d:
        return super().train(False)


_HELD: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: HeldBatchNorm1d,
    nn.BatchNorm2d: HeldBatchNorm2d,
    nn.BatchNorm3d: HeldBatchNorm3d,
}


def hold_statistics(model: nn.Module) -> int:
    """Hold every batch norm of the model that has running means; how many there are. Those that have none
    divide by the batch in inference too, and stay."""
    found = [m for m in model.modules() if isinstance(m, tuple(_HELD)) and m.track_running_stats]
    for module in found:
        module.__class__ = _HELD.get(type(module), type(module))
        module.eval()
    return len(found)
