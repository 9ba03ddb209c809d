"""What the tests of gradients share: a packed layer whose tensors a loss of their own is a function of, and
steps of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.gradients import Making, Window
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.model.linear import PackedLinear
from tests.packed_tools import random_weight

ROWS = IntGrid(bits=3, group_size=-1, symmetric=False, residual_bits=4)


class Layer(nn.Module):
    """One packed layer [N, K] with an adapter whose tensors (A and B, or a dense part) are all at work."""

    def __init__(
        self,
        method: str = "lr_qat",
        shape: tuple[int, int] = (3, 8),
        grid: IntGrid = ROWS,
        seed: int = 0,
        size: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__()
        self.linear = PackedLinear(random_weight(shape, grid, seed=seed))
        torch.manual_seed(seed)
        dense = ADAPTERS[method].dense_delta
        attach(self, ADAPTERS[method](**(options if dense else {"rank": 1} | options)))
        with torch.no_grad():
            (self.adapter.delta if dense else self.adapter.B).normal_(0, size)

    @property
    def adapter(self) -> Any:
        return self.linear.adapter

    @property
    def packed(self) -> PackedWeight:
        assert isinstance(self.linear.base, PackedWeight)
        return self.linear.base


def making(
    model: nn.Module, total: int = 10, rate: float = 0.1, only: tuple[str, ...] = ("A", "B", "delta")
) -> Making:
    """Of these tensors of the adapter."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[2] in only}
    return Making(model, trained, total, 0, lambda step: rate)


def flat(tensors: dict[str, Any]) -> Tensor:
    """All numbers of the tensors (or of their gradients), fp64, by name."""
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


def gradients(made: Making) -> Tensor:
    return flat({name: p.grad for name, p in made.trained.items()})


def window(loss: Callable[[int], Tensor], step: int = 0, size: int = 1) -> Window:
    """A step of one process, of a loss with one part."""
    return Window(
        step=step,
        size=size,
        factors=torch.ones(1, dtype=torch.float64),
        loss=lambda i: loss(i)[None],
        backward=lambda scalar: scalar.backward(),
        alone=lambda i: nullcontext(),
        mean=lambda t: t.double(),
    )
