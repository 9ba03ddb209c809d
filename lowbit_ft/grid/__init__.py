"""Grids: what a code means. `IntGrid` and `BinaryGrid` are facts, `PackedWeight` and `BinaryWeight` the
tensors on them.

A new grid is a frozen dataclass (one file) and one line in GRIDS. Its `kind` says what its weights are: one
of WEIGHTS, whose calibrators, adapters and exporters then serve it; or a new one, which brings a weight class
with the verbs of packed.py and its line there.
"""

from collections.abc import Mapping
from dataclasses import fields
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


def grid_of(name: str, settings: Mapping[str, Any]) -> Grid:
    """The grid of that name with those of `settings` (keys of the quant section, and `mask`) that it has.
    ValueError for a value it cannot have.
    """
    grid = GRIDS[name]
    return grid(**{field.name: settings[field.name] for field in fields(grid) if field.name in settings})


def grid_from_json(data: dict[str, Any]) -> Grid:
    """The inverse of `to_json`. ValueError for an unknown grid, key or value."""
    values = dict(data)
    name = values.pop("grid", None)
    if name not in GRIDS:
        raise ValueError(f"grid: got {name!r}; allowed are {', '.join(GRIDS)}")
    try:
        return GRIDS[name](**values)
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
    "grid_of",
    "stack_rows",
]
