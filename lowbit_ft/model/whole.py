"""Dense modules that train whole (adapter.modules_to_save), and the new rows of tables that only grow.

    w = round(master) to the dtype that the module has and ships in, in every forward       master: fp32

The module stays where it is, of its own class but for its parameters, which from here on read the rounded
masters: so whoever multiplies with `head.weight` has what ships, and the gradient goes straight through the
rounding. What it was lies beside them, frozen, for whoever asks for the base alone (`untrained`). Modules
that share a parameter (a tied head) share its master: one tensor is trained and one ships.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .linear import PackedLinear
from .rows import SLOT as ROWS_SLOT
from .rows import NewRows

SLOT = "trained_whole"  # the masters' name in their module


class Masters(nn.Module):
    """The fp32 masters of a module's parameters, by the names they have there."""

    off: bool = False  # read what was there before

    def __init__(self, masters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, master in masters.items():
            self.register_parameter(name, master)

    def value(self, name: str, before: Tensor) -> Tensor:
        """What the module's parameter `name` is now, in the dtype of what it was."""
        master = None if self.off else self._parameters[name]
        return before if master is None else master.to(before.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Masters:
        """`.to(dtype)` moves masters and leaves them fp32."""

        def keep(tensor: Tensor) -> Tensor:
            return fn(tensor).to(tensor.dtype)

        return super()._apply(keep, recurse)


def is_whole(parameter: str) -> bool:
    """Whether the parameter of this name is the master of a dense one, or of rows of it."""
    return any(f".{slot}." in f".{parameter}" for slot in (SLOT, ROWS_SLOT))


def masters_of(module: nn.Module) -> Masters | None:
    """What trains of a module, where it trains whole."""
    found = module._modules.get(SLOT)
    return found if isinstance(found, Masters) else None


def whole_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Masters]]:
    """(name, module, masters) of every module that trains whole, in model order."""
    for name, module in model.named_modules():
        if (masters := masters_of(module)) is not None:
            yield name, module, masters


def dense_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters of their own that are not packed, nor a part of what trains something."""
    packed = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, PackedLinear))
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and not isinstance(module, PackedLinear | Masters | NewRows)
        and not name.startswith(packed)
        and any(True for _ in module.parameters(recurse=False))
    }


def tied_to(model: nn.Module, names: list[str]) -> list[str]:
    """These dense modules and all that share a parameter with one of them, in model order."""
    dense = dense_modules(model)
    wanted = {id(p) for name in names for p in dense[name].parameters(recurse=False)}
    return [
        name
        for name, module in dense.items()
        if name in names or any(id(p) in wanted for p in module.parameters(recurse=False))
    ]


def train_whole(model: nn.Module, names: list[str]) -> list[str]:
    """Give these dense modules, and what is tied to them, masters that start as they are, and return their
    names."""
    dense, shared = dense_modules(model), {}
    found = tied_to(model, names)
    for name in found:
        module = dense[name]
        masters = {}
        for key, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if id(parameter) not in shared:
                # a copy, of fp32 too: what was there is read again
                shared[id(parameter)] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            masters[key] = shared[id(parameter)]
        _put(module, masters)
    return found


def train_parameters(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Give these dense parameters (of the model, by name) masters, and no other of their modules. The names
    of the modules."""
    keys: dict[str, list[str]] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        keys.setdefault(owner, []).append(key)
    for owner, wanted in keys.items():
        module = model.get_submodule(owner)
        held = {key: module.get_parameter(key).requires_grad_(False) for key in wanted}
        _put(module, {k: nn.Parameter(p.detach().to(torch.float32, copy=True)) for k, p in held.items()})
    return list(keys)


def _put(module: nn.Module, masters: dict[str, nn.Parameter]) -> None:
    setattr(module, SLOT, Masters(masters))
    module.__class__ = _reading(type(module), tuple(masters))


@functools.cache
def _reading(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of a module whose parameters of these names read their masters."""

    def read(name: str) -> property:
        return property(lambda module: module._modules[SLOT].value(name, module._parameters[name]))

    return type(kind.__name__, (kind,), {name: read(name) for name in names})


def whole_tensors(model: nn.Module, every_name: bool = False) -> dict[str, tuple[nn.Parameter, torch.dtype]]:
    """By the name of the model's parameter: its master, and the dtype it ships in. A shared one is there
    once, under its first name; every_name: under each."""
    found: dict[str, tuple[nn.Parameter, torch.dtype]] = {}
    seen: set[int] = set()
    for name, module, masters in whole_modules(model):
        for key, master in masters.named_parameters(recurse=False):
            if every_name or id(master) not in seen:
                seen.add(id(master))
                before = module._parameters[key]
                assert before is not None
                found[f"{name}.{key}"] = (master, before.dtype)
    return found


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Inside, every dense module is what it was before training."""
    trained = [module for module in model.modules() if isinstance(module, Masters | NewRows)]
    held = [(module, module.off) for module in trained]
    for module in trained:
        module.off = True
    try:
        yield
    finally:
        for module, before in held:
            module.off = before
