"""Modules that are trained whole, dense, beside the adapters: the head of a task.

PEFT calls them modules_to_save, and so they lie in the adapter folder: base_model.model.<parameter>. They are
fp32 and ship as they are trained: the merge writes them in the place of what the checkpoint has.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.linear import PackedLinear


def train_whole(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """From here on the parameters of these names train; returns their numbers. ValueError for one that is not
    fp32.
    """
    found = dict(model.named_parameters())
    for name in names:
        if found[name].dtype != torch.float32:
            raise ValueError(
                f"{name}: got {found[name].dtype}; what trains whole is float32: set model.dtype: float32"
            )
        found[name].requires_grad_(True)
    return {name: found[name].numel() for name in names}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """What trains (or was trained) whole, by name in the model."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    beside = tuple(f"{name}." for name in packed)
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(beside)
    }


@contextmanager
def whole_as(model: nn.Module, value: Callable[[str], Tensor]) -> Iterator[None]:
    """Inside, what trains whole has the values value(name): those it came with."""
    held = whole_state(model)
    before = {name: tensor.clone() for name, tensor in held.items()}
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(value(name))
        try:
            yield
        finally:
            for name, tensor in held.items():
                tensor.copy_(before[name])
