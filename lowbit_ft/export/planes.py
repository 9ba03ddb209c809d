"""Sign planes in integer formats: exact where the scales of a group are tied, refused elsewhere.

    W = sum_k alpha_k b_k, b_k = +-1.  Tied: sorted, alpha = s (1, 2, 4, ...).  Then W / s is an odd integer
                                       between +-(2^q - 1)

so W lies on the symmetric integer grid of q + 1 bits with scale s, bit for bit (odd numbers only: the step of
q bits is 2 s, but its zero would lie between two codes). One plane is always tied. AlphaTuning trains the
scales of several planes apart, so those ship in the native format, packed, through `import lowbit_ft`.
"""

from dataclasses import replace

import lowbit_kernels as kernels
import torch
from lowbit_kernels.layout import grouped, per_group, ungrouped

from ..grid import BinaryGrid, BinaryWeight, Grid, IntGrid, PackedWeight, Weight
from .base import Exporter, LayerSpec, Weights

_BITS = {
    1: 2,
    2: 3,
    3: 4,
    4: 8,
}  # planes -> bits of a grid that formats have, with 2^q - 1 on both sides of 0


def integer_grid(grid: BinaryGrid) -> IntGrid:
    """The grid that holds tied planes."""
    return IntGrid(
        bits=_BITS[grid.bits],
        group_size=grid.group_size,
        symmetric=True,
        residual_bits=0,
        scale_dtype=grid.scale_dtype,
    )


def held(exporter: Exporter, grid: Grid) -> Grid:
    """The grid a format would hold this one as: one plane as integers where the format has no planes, else
    the grid itself.
    """
    if isinstance(grid, BinaryGrid) and grid.bits == 1 and exporter.reject(grid):
        return integer_grid(grid)
    return grid


def tied(weight: BinaryWeight) -> bool:
    """Whether every group has scales s, 2 s, 4 s, ... in some order."""
    scale = weight.scale.float().sort(0).values
    powers = torch.tensor([2.0**k for k in range(len(scale))], device=scale.device).view(-1, 1, 1)
    return bool((scale[0] > 0).all()) and torch.equal(scale, scale[:1] * powers)


def to_integers(weight: BinaryWeight) -> PackedWeight:
    """The same weight on `integer_grid`. ValueError when it is not tied."""
    if not tied(weight):
        raise ValueError(
            "its plane scales are not tied (each plane twice another in every group), so no "
            "integer grid holds it; "
            "set export.format: native, which transformers serves packed after `import lowbit_ft`"
        )
    grid, (n, k) = integer_grid(weight.grid), weight.shape
    scale = weight.scale.amin(0)
    units = grouped(weight.dequantize(torch.float32), grid.group_size) / per_group(scale.float(), slice(0, n))
    codes = ungrouped(units, k).round() + grid.levels // 2
    return PackedWeight(
        codes=kernels.pack(codes.to(torch.uint8), grid.bits), scale=scale, shape=weight.shape, grid=grid
    )


def as_integers(weights: Weights, exporter: Exporter) -> Weights:
    """The weights with planes as integers where the format has no planes. ValueError naming the layers that
    cannot be, before any is asked for."""
    planes = [
        name
        for name, spec in weights.specs.items()
        if isinstance(spec.grid, BinaryGrid) and exporter.reject(spec.grid)
    ]
    if not planes:
        return weights
    problems = []
    for name in planes:
        if weights.specs[name].grid.bits > 1:
            weight = weights[name]
            assert isinstance(weight, BinaryWeight)
            if not tied(weight):
                problems.append(name)
    if problems:
        raise ValueError(
            f"{exporter.name} has no sign planes, and the scales of {len(problems)} layers ({problems[0]}, "
            "...) are not tied (each plane "
            "twice another in every group), so no integer grid holds them; set export.format: native, "
            "which transformers serves "
            "packed after `import lowbit_ft`"
        )
    specs: dict[str, LayerSpec] = dict(weights.specs)
    for name in planes:
        grid = weights.specs[name].grid
        assert isinstance(grid, BinaryGrid)
        specs[name] = replace(weights.specs[name], grid=integer_grid(grid))

    def make(name: str) -> Weight:
        weight = weights[name]
        return to_integers(weight) if name in planes and isinstance(weight, BinaryWeight) else weight

    return Weights(specs, make)
