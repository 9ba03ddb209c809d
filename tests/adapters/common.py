"""Bases and trained adapters for the tests of this folder: small, ragged, and with weights of size about 1.

With W ~ N(0, 1) a grid step is a few tenths, so one size of random trained tensors moves codes by some steps
whether the method counts in grid steps or in weight units.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit_ft.adapters import Adapter, AdapterConfig
from lowbit_ft.grid import BinaryGrid, IntGrid, PackedWeight, Weight
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats

N, K = 13, 200  # odd, and divisible neither by a group of 32, 64, 128 nor by a superblock
LOW_RANK = ["lr_qat", "dl_qat", "l4q"]


def base_of(
    grid: IntGrid | BinaryGrid, shape: tuple[int, int] = (N, K), calibrate: str | None = None
) -> Weight:
    """A random weight, not centred (so that asymmetric zero points differ from the middle), calibrated on the
    grid. On symmetric grids every other row has scales below zero, as they may (grid/calibrate/ranges.py).
    """
    weight = torch.randn(shape) + 0.3
    name = calibrate or (
        "greedy" if isinstance(grid, BinaryGrid) else "absmax" if grid.symmetric else "minmax"
    )
    if isinstance(grid, BinaryGrid) or not grid.symmetric:
        return CALIBRATORS[name].run(weight, grid, Stats())
    signs = torch.where(torch.arange(shape[0]) % 2 == 0, 1.0, -1.0)
    base = CALIBRATORS[name].run(weight * signs[:, None], grid, Stats())
    return replace(base, scale=base.scale * signs.to(base.scale.dtype))


def packed(grid: IntGrid, shape: tuple[int, int] = (N, K), calibrate: str | None = None) -> PackedWeight:
    """`base_of` on an integer grid."""
    base = base_of(grid, shape, calibrate)
    assert isinstance(base, PackedWeight)
    return base


@torch.no_grad()
def randomize(adapter: nn.Module, size: float = 1.0) -> None:
    """Trained tensors `size` away from their start. At 1 codes move by several steps and some leave the
    range.
    """
    for name, parameter in adapter.named_parameters():
        leaf = name.rpartition(".")[2]
        if getattr(getattr(adapter, "config", None), "ternary", False):
            if leaf == "B":  # A is its start: a third and more of it is 0
                parameter.copy_(torch.randint(0, 2, parameter.shape) * 2 - 1)
        elif leaf == "B":
            parameter.normal_(0, 3.0 * size)
        elif leaf == "delta":
            parameter.normal_(0, 2.0 * size)
        elif leaf == "offset":
            parameter.normal_(0, 0.8 * size)
        elif leaf != "A":
            parameter.add_(torch.randn_like(parameter) * 0.1 * size)


def trained(
    config: AdapterConfig, base: Weight, weight: Tensor | None = None, *, size: float = 1.0
) -> Adapter:
    adapter = config.build(base, weight)
    randomize(adapter, size)
    return adapter
