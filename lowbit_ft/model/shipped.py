"""What a dense tensor of a model is when it ships: the trained one where there is one, else the checkpoint's.

`ShippedCheckpoint` is a checkpoint that answers so. Whoever writes or compares a model that was trained
reads this one: merged/, every format and `verify` ask it and nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .fused import Fusion
from .rows import row_tables, table_of
from .whole import whole_tensors


@dataclass(frozen=True)
class Trained:
    """A dense tensor as it ships: shape, dtype, and how it is made when it is asked for, on any device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], Tensor]


def trained_tensors(model: nn.Module) -> dict[str, Trained]:
    """What a model that trained ships of its dense modules, by the parameter's name: the rounded masters, as
    its forward reads them."""

    def one(master: nn.Parameter, dtype: torch.dtype) -> Trained:
        return Trained(tuple(master.shape), dtype, lambda: master.detach().to(dtype))

    found = {name: one(*held) for name, held in whole_tensors(model).items()}
    for name, module, rows in row_tables(model):
        table = table_of(module)
        shape, write = tuple(table.shape), partial(rows.write, table.detach())
        found[f"{name}.weight"] = Trained(shape, table.dtype, write)
    return found


class ShippedCheckpoint(Checkpoint):
    """`below` but for the parameters in `trained`. ValueError where one of them is not a tensor of the files
    by itself, which then could not be exchanged."""

    def __init__(self, below: Checkpoint, trained: Mapping[str, Trained]) -> None:
        below.refuse_strangers()  # it knows its names from here on
        self.__dict__.update(vars(below))
        self.below, self.trained = below, dict(trained)
        self._parameters: dict[str, str] = {}  # file tensor -> the parameter that replaces it
        for name in self.trained:
            if (reason := unexchangeable(below, name)) is not None:
                raise ValueError(f"{name}: {reason}")
            self._parameters[below.keys_for(name)[0]] = name

    @property
    def replaced(self) -> dict[str, Trained]:
        """The trained tensors by the names of the file tensors they stand for."""
        return {key: self.trained[name] for key, name in self._parameters.items()}

    def empty_model(self, attention: str = "sdpa") -> Any:
        return self.below.empty_model(attention)

    def online(self, model: Any) -> None:
        self.below.online(model)

    def take_apart(self, fusions: Mapping[str, Fusion]) -> None:
        super().take_apart(fusions)
        self.below.take_apart(fusions)

    def shape(self, name: str) -> tuple[int, ...]:
        found = self.replaced.get(name)
        return self.below.shape(name) if found is None else found.shape

    def stored_dtype(self, name: str) -> torch.dtype:
        found = self.replaced.get(name)
        return self.below.stored_dtype(name) if found is None else found.dtype

    def read(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        row: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        found = self.replaced.get(name)
        if found is None:
            return self.below.read(name, device=device, dtype=dtype, row=row, rows=rows)
        value = found.value()
        value = value if row is None else value[row]
        value = value if rows is None else value[rows[0] : rows[1]]
        return value.to(device, dtype or found.dtype).contiguous()

    def stored_pieces(self, name: str) -> Iterator[Tensor]:
        if name not in self._parameters:
            return self.below.stored_pieces(name)
        return iter([self.read(name).view(-1)])


def as_shipped(checkpoint: Checkpoint, trained: Mapping[str, Trained]) -> Checkpoint:
    """The checkpoint as the model ships; itself where nothing dense was trained."""
    return ShippedCheckpoint(checkpoint, trained) if trained else checkpoint


def unexchangeable(checkpoint: Checkpoint, parameter: str) -> str | None:
    """Why a trained parameter could not take the place of what is in the files; None: it can."""
    keys = checkpoint.keys_for(parameter)
    if len(keys) == 1 and parameter not in checkpoint.converted():
        return None
    made = f"{len(keys)} tensors of the files make it" if keys else "the files have no tensor for it"
    return f"{made}, so a trained one could not take its place"
