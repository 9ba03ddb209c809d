"""Optimizers by name, two learning rates, and the learning-rate curve.

Two groups of parameters: the low-rank matrices (learning_rate, weight_decay) and the scales, magnitudes and
offsets (scale_learning_rate, never decayed: decay would pull every scale towards its start or towards
zero). Which is which is the last part of the parameter's name, in adapters.SCALE_PARAMETERS.

The curve is a function of (step, total) and nothing else, so there is no scheduler state to save or to get
wrong when a run is resumed: the loop sets the rates before each step. With s the 0-based step, W warm-up
steps, T steps in all, m = min_lr_ratio and p = (s - W) / (T - W):

    warm-up   (s + 1) / W                     s < W: the first step already moves
    linear    m + (1 - m) (1 - p)
    cosine    m + (1 - m) (1 + cos(pi p)) / 2
    wsd       1, then over the last D = decay_ratio T steps m + (1 - m) (T - s) / D
    constant  1
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import SCALE_PARAMETERS
from ..model.shards import part_like, whole

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


# recipe name -> (class name in bitsandbytes.optim, or "" for torch; what it takes beside lr and
# weight_decay). Not here: (Paged)AdEMAMix32bit, whose state has the wrong shape (bitsandbytes 0.50); AdEMAMix
# is 32 bit as it is.
OPTIMIZERS: dict[str, tuple[str, Arguments]] = {
    "adamw": ("", _adam),
    "adamw32bit": ("AdamW32bit", _adam),
    "adamw8bit": ("AdamW8bit", _adam),
    "paged_adamw": ("PagedAdamW", _adam),
    "paged_adamw32bit": ("PagedAdamW32bit", _adam),
    "paged_adamw8bit": ("PagedAdamW8bit", _adam),
    "adam": ("Adam", _adam),
    "adam32bit": ("Adam32bit", _adam),
    "adam8bit": ("Adam8bit", _adam),
    "paged_adam": ("PagedAdam", _adam),
    "paged_adam32bit": ("PagedAdam32bit", _adam),
    "paged_adam8bit": ("PagedAdam8bit", _adam),
    "ademamix": ("AdEMAMix", _ademamix),
    "ademamix8bit": ("AdEMAMix8bit", _ademamix),
    "paged_ademamix": ("PagedAdEMAMix", _ademamix),
    "paged_ademamix8bit": ("PagedAdEMAMix8bit", _ademamix),
    "lion": ("Lion", _lion),
    "lion32bit": ("Lion32bit", _lion),
    "lion8bit": ("Lion8bit", _lion),
    "paged_lion": ("PagedLion", _lion),
    "paged_lion32bit": ("PagedLion32bit", _lion),
    "paged_lion8bit": ("PagedLion8bit", _lion),
    "rmsprop": ("RMSprop", _rmsprop),
    "rmsprop32bit": ("RMSprop32bit", _rmsprop),
    "rmsprop8bit": ("RMSprop8bit", _rmsprop),
    "sgd": ("SGD", _momentum),
    "sgd32bit": ("SGD32bit", _momentum),
    "sgd8bit": ("SGD8bit", _momentum),
    "lamb": ("LAMB", _adam),
    "lamb32bit": ("LAMB32bit", _adam),
    "lamb8bit": ("LAMB8bit", _adam),
    "lars": ("LARS", _momentum),
    "lars32bit": ("LARS32bit", _momentum),
    "lars8bit": ("LARS8bit", _momentum),
    "adagrad": ("Adagrad", _adagrad),
    "adagrad32bit": ("Adagrad32bit", _adagrad),
    "adagrad8bit": ("Adagrad8bit", _adagrad),
}


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], section: Any) -> torch.optim.Optimizer:
    """The optimizer of a TrainSection over (name, parameter) pairs, in one or two groups; group["peak"] is
    its rate.

    Raises ValueError for an unknown name, no parameters, or bitsandbytes missing.
    """
    if section.optimizer not in OPTIMIZERS:
        near = difflib.get_close_matches(section.optimizer, OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"train.optimizer: got {section.optimizer!r}; allowed: {', '.join(OPTIMIZERS)}{hint}"
        )
    groups = {"low_rank": [], "scale": []}
    for name, parameter in named:
        groups["scale" if name.rsplit(".", 1)[-1] in SCALE_PARAMETERS else "low_rank"].append(parameter)
    rate = section.learning_rate
    scale_rate = rate if section.scale_learning_rate is None else section.scale_learning_rate
    settings = {
        "low_rank": {"lr": rate, "peak": rate, "weight_decay": section.weight_decay},
        "scale": {"lr": scale_rate, "peak": scale_rate, "weight_decay": 0.0},
    }
    used = [{"params": params, "name": name, **settings[name]} for name, params in groups.items() if params]
    if not used:
        raise ValueError(
            "nothing to train: no parameter of the model requires a gradient; attach an adapter first"
        )
    class_name, arguments = OPTIMIZERS[section.optimizer]
    if not class_name:
        return torch.optim.AdamW(used, lr=rate, fused=True, **arguments(section))
    try:
        library = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ValueError(
            f"train.optimizer: {section.optimizer!r} is from bitsandbytes, which cannot be imported "
            f"({error}); "
            "pip install bitsandbytes, or set optimizer: adamw"
        ) from error
    kind, settings = getattr(library, class_name), arguments(section)
    _try(
        section.optimizer,
        kind,
        settings,
        max((p for group in used for p in group["params"]), key=torch.numel),
    )
    return kind(used, lr=rate, **settings)


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


def lr_factor(section: Any, step: int, total: int) -> float:
    """The learning rate of 0-based `step` of `total`, as a fraction of the peak; equations at the top of
    the file.
    """
    warmup = min(round(section.warmup_ratio * total), total)
    if step < warmup:
        return (step + 1) / warmup
    low, progress = section.min_lr_ratio, (step - warmup) / max(1, total - warmup)
    if section.scheduler == "linear":
        return low + (1 - low) * (1 - progress)
    if section.scheduler == "cosine":
        return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
    if section.scheduler == "wsd":
        decay = max(1, round(section.decay_ratio * total))
        return low + (1 - low) * min(1.0, (total - step) / decay)
    if section.scheduler == "constant":
        return 1.0
    raise ValueError(f"train.scheduler: got {section.scheduler!r}; allowed: linear, cosine, wsd, constant")


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to peak x factor; returns {"lr": ..., "scale_lr": ...} of the groups there are."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return {"scale_lr" if g["name"] == "scale" else "lr": g["lr"] for g in optimizer.param_groups}


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """({"<parameter>/<key>": tensor}, {"<parameter>": {key: number}}): the state, without a pickle.

    bitsandbytes shares its quantization tables between parameters; each tensor here has its own memory.
    Sharded states are gathered whole, which every process must take part in.
    """
    tensors, numbers = {}, {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{key}"] = whole(value.detach()).to("cpu", copy=True).contiguous()
            else:
                numbers.setdefault(names[parameter], {})[key] = value
    return tensors, numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: dict[Tensor, str],
    tensors: dict[str, Tensor],
    numbers: dict[str, dict[str, Any]],
) -> None:
    """Inverse of `optimizer_state`. Not Optimizer.load_state_dict: that one casts, and this must be
    bit-equal.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for name, values in numbers.items():
        optimizer.state[parameters[name]].update(values)
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        part = part_like(
            tensor, parameter if tensor.shape == parameter.shape else torch.empty(0, device=parameter.device)
        )
        place = None
        if key in ("state1", "state2") and getattr(optimizer, "is_paged", False):
            place = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # pyright: ignore  (bitsandbytes)
        if place is None or place.shape != tensor.shape:
            place = torch.empty_like(part)
        optimizer.state[parameter][key] = place.copy_(part)
