"""Grids: what a code means. `IntGrid` and `BinaryGrid` are facts, `PackedWeight` and `BinaryWeight` the
tensors on them.

A new grid is a frozen dataclass (one file), a weight class with the verbs of packed.py, and one line in GRIDS
and WEIGHTS.
"""

from typing import Any

from .binary import BinaryGrid
from .integer import IntGrid
from .packed import (
    WEIGHTS,
    BinaryWeight,
    GridArgs,
    PackedWeight,
    PlaneArgs,
    Weight,
    empty_weight,
    stack_rows,
)

Grid = IntGrid | BinaryGrid
GRIDS: dict[str, type[IntGrid] | type[BinaryGrid]] = {"integer": IntGrid, "binary": BinaryGrid}


def grid_from_json(data: dict[str, Any]) -> Grid:
    """The inverse of `to_json`. ValueError for an unknown grid, key or value."""
    fields = dict(data)
    name = fields.pop("grid", None)
    if name not in GRIDS:
        raise ValueError(f"grid: got {name!r}; allowed are {', '.join(GRIDS)}")
    try:
        return GRIDS[name](**fields)
    except TypeError as error:
        raise ValueError(f"grid {name}: {error}") from None


__all__ = [
    "GRIDS",
    "WEIGHTS",
    "BinaryGrid",
    "BinaryWeight",
    "Grid",
    "GridArgs",
    "IntGrid",
    "PackedWeight",
    "PlaneArgs",
    "Weight",
    "empty_weight",
    "grid_from_json",
    "stack_rows",
]
