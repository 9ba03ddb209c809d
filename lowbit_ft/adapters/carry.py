"""Carry: an optimizer's averages follow the rows of a tensor that an adapter has just put elsewhere.

A row that stays keeps its averages. One that is new begins with nothing, except in what is never negative (a
mean of squares): there it begins at the mean of those that stay, because an average of old age and no size
would make its first steps several times too long.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Carried:
    """Row i of the parameter is the one that was row source[i] of it (int64 [R]); -1: it is new."""

    parameter: nn.Parameter
    source: Tensor


@torch.no_grad()
def carry_rows(optimizer: torch.optim.Optimizer, carried: Iterable[Carried]) -> None:
    """Move the averages in place. ValueError for an optimizer that keeps them otherwise than one number per
    number, so that they cannot follow a row.
    """
    for one in carried:
        for key, value in optimizer.state.get(one.parameter, {}).items():
            if not isinstance(value, Tensor) or value.numel() <= 1:
                continue  # a count of steps
            if value.shape != one.parameter.shape or not value.is_floating_point():
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} as {value.dtype} "
                    f"{tuple(value.shape)} for rows of {tuple(one.parameter.shape)}, which cannot follow a "
                    "row; use an optimizer with 32-bit "
                    "averages (adamw), or adapter.refresh_steps: null"
                )
            new = one.source < 0
            rows = followed(value, one.source)
            stayed = rows[~new]
            if bool((value >= 0).all()) and len(stayed) > 0:
                rows[new] = stayed.mean(0)
            value.copy_(rows)


def followed(value: Tensor, source: Tensor) -> Tensor:
    """The rows of an average where they are now: row i was row source[i], or 0 where it is new."""
    rows = value[source.clamp_min(0)]
    rows[source < 0] = 0
    return rows
