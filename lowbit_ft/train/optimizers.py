"""Optimizers: train.optimizer. OPTIMIZERS is the list: how each is made, and what it keeps.

To add one: what makes it of parameter groups and the train section, and its line in OPTIMIZERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Groups = list[dict[str, Any]]  # what torch.optim takes: params, lr, weight_decay, and our name and peak


@dataclass(frozen=True)
class Optimizer:
    """make(groups, section) -> a torch.optim.Optimizer; ValueError where it cannot run.

    states: averages it keeps per trained number, of `bits` each (8: bitsandbytes' blocks); paged: they may
    wait in CPU memory; counter: bytes per tensor besides; shards: it can step on the shards of FSDP2;
    package: what must be installed for it.
    """

    make: Callable[[Groups, Any], torch.optim.Optimizer]
    states: int = 1
    bits: int = 32
    paged: bool = False
    counter: int = 0
    shards: bool = False
    package: str | None = None


Arguments = Callable[[Any], dict[str, Any]]


def _adam(section: Any) -> dict[str, Any]:
    return {"betas": tuple(section.betas), "eps": section.eps}


def _ademamix(section: Any) -> dict[str, Any]:
    return {
        "betas": (*section.betas, 0.9999),
        "eps": section.eps,
    }  # the slow average's beta: the paper's default


def _lion(section: Any) -> dict[str, Any]:
    return {"betas": tuple(section.betas)}


def _rmsprop(section: Any) -> dict[str, Any]:
    return {"alpha": section.betas[1], "eps": section.eps}


def _momentum(section: Any) -> dict[str, Any]:
    return {"momentum": section.betas[0]}


def _adagrad(section: Any) -> dict[str, Any]:
    return {"eps": section.eps}


def adamw(groups: Groups, section: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=section.learning_rate, fused=True, **_adam(section))


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


# Not here: (Paged)AdEMAMix32bit, whose state has the wrong shape (bitsandbytes 0.50); AdEMAMix is 32 bit as
# it is.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(adamw, states=2, counter=4, shards=True),
    "adamw32bit": bitsandbytes("AdamW32bit", _adam, states=2),
    "adamw8bit": bitsandbytes("AdamW8bit", _adam, states=2),
    "paged_adamw": bitsandbytes("PagedAdamW", _adam, states=2),
    "paged_adamw32bit": bitsandbytes("PagedAdamW32bit", _adam, states=2),
    "paged_adamw8bit": bitsandbytes("PagedAdamW8bit", _adam, states=2),
    "adam": bitsandbytes("Adam", _adam, states=2),
    "adam32bit": bitsandbytes("Adam32bit", _adam, states=2),
    "adam8bit": bitsandbytes("Adam8bit", _adam, states=2),
    "paged_adam": bitsandbytes("PagedAdam", _adam, states=2),
    "paged_adam32bit": bitsandbytes("PagedAdam32bit", _adam, states=2),
    "paged_adam8bit": bitsandbytes("PagedAdam8bit", _adam, states=2),
    "ademamix": bitsandbytes("AdEMAMix", _ademamix, states=3),
    "ademamix8bit": bitsandbytes("AdEMAMix8bit", _ademamix, states=3),
    "paged_ademamix": bitsandbytes("PagedAdEMAMix", _ademamix, states=3),
    "paged_ademamix8bit": bitsandbytes("PagedAdEMAMix8bit", _ademamix, states=3),
    "lion": bitsandbytes("Lion", _lion),
    "lion32bit": bitsandbytes("Lion32bit", _lion),
    "lion8bit": bitsandbytes("Lion8bit", _lion),
    "paged_lion": bitsandbytes("PagedLion", _lion),
    "paged_lion32bit": bitsandbytes("PagedLion32bit", _lion),
    "paged_lion8bit": bitsandbytes("PagedLion8bit", _lion),
    "rmsprop": bitsandbytes("RMSprop", _rmsprop),
    "rmsprop32bit": bitsandbytes("RMSprop32bit", _rmsprop),
    "rmsprop8bit": bitsandbytes("RMSprop8bit", _rmsprop),
    "sgd": bitsandbytes("SGD", _momentum),
    "sgd32bit": bitsandbytes("SGD32bit", _momentum),
    "sgd8bit": bitsandbytes("SGD8bit", _momentum),
    "lamb": bitsandbytes("LAMB", _adam, states=2),
    "lamb32bit": bitsandbytes("LAMB32bit", _adam, states=2),
    "lamb8bit": bitsandbytes("LAMB8bit", _adam, states=2),
    "lars": bitsandbytes("LARS", _momentum),
    "lars32bit": bitsandbytes("LARS32bit", _momentum),
    "lars8bit": bitsandbytes("LARS8bit", _momentum),
    "adagrad": bitsandbytes("Adagrad", _adagrad),
    "adagrad32bit": bitsandbytes("Adagrad32bit", _adagrad),
    "adagrad8bit": bitsandbytes("Adagrad8bit", _adagrad),
}
