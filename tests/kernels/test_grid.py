"""grid.py: the arguments that the grid ops share are said once, and every op and launcher has them."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from lowbit_kernels.grid import GridWeight, flat

OPS = ("grid_codes", "grid_gradients", "grid_row_gradients", "grid_linear", "grid_estimates")
VALUES = {name: f"the {name}" for name in GridWeight._fields}


@flat
def told(x: int, grid: GridWeight, last: int, more: int = 7) -> tuple[int, GridWeight, int, int]:
    return x, grid, last, more


def test_a_flat_function_takes_the_fields_by_place_and_by_name() -> None:
    want = (1, GridWeight(**VALUES), 2)
    assert told(1, *VALUES.values(), 2) == told(1, **VALUES, last=2) == (*want, 7)
    assert told(x=1, last=2, more=3, **VALUES) == told(1, *VALUES.values(), 2, more=3) == (*want, 3)
    with pytest.raises(TypeError, match="missing a required argument: 'gain'"):
        told(1, **{name: value for name, value in VALUES.items() if name != "gain"}, last=2)


def test_a_flat_function_shows_the_fields_with_their_types() -> None:
    parameters = inspect.signature(told).parameters
    assert list(parameters) == ["x", *GridWeight._fields, "last", "more"]
    assert parameters["residual"].annotation == torch.Tensor | None and parameters["more"].default == 7


@pytest.mark.parametrize("op", OPS)
def test_every_grid_op_has_the_fields_in_their_order(op: str) -> None:
    schema = getattr(torch.ops.lowbit, op).default._schema
    names = [argument.name for argument in schema.arguments]
    start = names.index("codes")
    assert tuple(names[start : start + len(GridWeight._fields)]) == GridWeight._fields


def test_launchers_take_what_their_ops_take() -> None:
    pytest.importorskip("triton")
    from lowbit_kernels import dispatch

    for op, (_, module) in dispatch.KERNELS.items():
        wanted = inspect.signature(dispatch.definition(op)._init_fn).parameters
        launcher = getattr(importlib.import_module(f"lowbit_kernels.{module}"), op)
        assert list(inspect.signature(launcher).parameters) == list(wanted), op
