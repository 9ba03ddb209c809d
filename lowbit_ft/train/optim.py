"""The optimizer of a run, its two learning rates, and its state without a pickle.

Three groups of parameters: the low-rank matrices (learning_rate, weight_decay), the scales, magnitudes and
offsets (scale_learning_rate, never decayed: decay would pull every scale towards its start or towards zero),
and dense modules that train whole (modules_learning_rate, never decayed: they come trained). Which of the
first two is the last part of the parameter's name, said by its adapter.

The loop sets the rates before each step; the curves are in schedulers/, the optimizers in optimizers/.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import is_scale
from ..model.shards import part_like, whole
from ..model.whole import is_whole
from .optimizers import OPTIMIZERS
from .schedulers import SCHEDULERS, Left

RATE_NAMES = {"low_rank": "lr", "scale": "scale_lr", "modules": "modules_lr"}  # of the log


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], section: Any, master: str | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a TrainSection over (name, parameter) pairs, in up to three groups; group["peak"] is
    its rate. master: what the dense parts are held in, if that is less than fp32 (adapters/dense.py).

    Raises ValueError for no parameters, or an optimizer whose package is missing, or that cannot step on
    such a part.
    """
    groups = {"low_rank": [], "scale": [], "modules": []}
    for name, parameter in named:
        group = "modules" if is_whole(name) else "scale" if is_scale(name) else "low_rank"
        groups[group].append(parameter)
    rate = section.learning_rate
    if isinstance(rate, str):
        raise ValueError(
            f"learning_rate: got {rate!r}, which only load_recipe resolves; give a TrainSection of your own "
            "a number, for example 1e-3"
        )
    scale_rate = rate if section.scale_learning_rate is None else section.scale_learning_rate
    settings = {
        "low_rank": {"lr": rate, "peak": rate, "weight_decay": section.weight_decay},
        "scale": {"lr": scale_rate, "peak": scale_rate, "weight_decay": 0.0},
        "modules": {
            "lr": section.modules_learning_rate,
            "peak": section.modules_learning_rate,
            "weight_decay": 0.0,
        },
    }
    if short := [p for p in groups["low_rank"] if p.dtype != torch.float32]:
        assert len(short) == len(groups["low_rank"]), "dense parts are of one method"
        if problem := unheld(section.optimizer, master):
            raise ValueError(f"optimizer: got {section.optimizer!r}{problem}")
        settings["low_rank"]["master"] = master
    used = [{"params": params, "name": name, **settings[name]} for name, params in groups.items() if params]
    if not used:
        raise ValueError(
            "nothing to train: no parameter of the model requires a gradient; attach an adapter first"
        )
    return OPTIMIZERS[section.optimizer].make(used, section)


def unheld(optimizer: str, master: str | None) -> str | None:
    """Why an optimizer cannot step on what is held in `master`, to be put behind its name; None: it can."""
    if master is not None and OPTIMIZERS[optimizer].short:
        return None
    return (
        f", which steps on fp32 alone, and adapter.master is {master or 'not said'}; set optimizer: adamw, "
        "or adapter.master: fp32"
    )


def lr_factor(section: Any, step: int, total: int) -> float:
    """The learning rate of 0-based `step` of `total`, as a fraction of the peak; equations in
    schedulers/.
    """
    warmup = min(round(section.warmup_ratio * total), total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return SCHEDULERS[section.scheduler].factor(section, progress, Left(total - step, total))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to peak x factor; returns {"lr": ..., "scale_lr": ..., "modules_lr": ...} of those
    that are there."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return {RATE_NAMES[g["name"]]: g["lr"] for g in optimizer.param_groups}


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
