"""The optimizers of bitsandbytes: 32 or 8 bits of state, some of them paged."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import Groups, Optimizer

Arguments = Callable[[Any], dict[str, Any]]


def adam(section: Any) -> dict[str, Any]:
    return {"betas": tuple(section.betas), "eps": section.eps}


def ademamix(section: Any) -> dict[str, Any]:
    return {
        "betas": (*section.betas, 0.9999),
        "eps": section.eps,
    }  # the slow average's beta: the paper's default


def lion(section: Any) -> dict[str, Any]:
    return {"betas": tuple(section.betas)}


def rmsprop(section: Any) -> dict[str, Any]:
    return {"alpha": section.betas[1], "eps": section.eps}


def momentum(section: Any) -> dict[str, Any]:
    return {"momentum": section.betas[0]}


def adagrad(section: Any) -> dict[str, Any]:
    return {"eps": section.eps}


def bitsandbytes(class_name: str, arguments: Arguments, states: int = 1) -> Optimizer:
    """A class of bitsandbytes.optim; arguments: what it takes beside lr and weight_decay."""

    def make(groups: Groups, section: Any) -> torch.optim.Optimizer:
        try:
            library = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ValueError(
                f"train.optimizer: {section.optimizer!r} is from bitsandbytes, which cannot be imported "
                f"({error}); "
                "pip install bitsandbytes, or set optimizer: adamw"
            ) from error
        kind, settings = getattr(library, class_name), arguments(section)
        largest = max((p for group in groups for p in group["params"]), key=torch.numel)
        _try(section.optimizer, kind, settings, largest)
        return kind(groups, lr=section.learning_rate, **settings)

    bits = 8 if class_name.endswith("8bit") else 32
    return Optimizer(make, states, bits, class_name.startswith("Paged"), package="bitsandbytes")


def _try(name: str, kind: Any, settings: dict[str, Any], largest: Tensor) -> None:
    """One step of a tensor of its own, so that what bitsandbytes cannot do on this device is known before the
    first batch.

    ValueError when it fails. 8-bit states begin at 4096 elements, paged ones at 100,000.
    """
    device = largest.device
    small = nn.Parameter(torch.ones(min(largest.numel(), 1 << 17), device=device))
    small.grad = torch.ones_like(small)
    try:
        kind([small], lr=1e-3, **settings).step()
        done = bool((small != 1).all())
    except Exception as error:  # a library that is not built for a device raises anything, NameError too
        raise ValueError(
            f"train.optimizer: {name!r} does not run on {device} ({type(error).__name__}: {error}); "
            "install a bitsandbytes that is built for "
            "it, or set optimizer: adamw"
        ) from error
    if not done:
        raise ValueError(f"train.optimizer: {name!r} changes nothing on {device}; set optimizer: adamw")
