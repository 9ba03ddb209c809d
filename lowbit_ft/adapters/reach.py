"""Reach: whether a learning rate can move a single code in the steps there are.

Adam moves every element by about the learning rate per step, so after steps whose rates sum to s an element
of B is at most s, one of A at most a0 + s, and

    |D| = alpha/rank |B A| <= alpha * s * (a0 + s)            a0: the largest element that A starts with

A code moves when |D| passes what its residual leaves: with f residual bits the nearest ties are half a step
over 2^f away (f = 0: half a step), in weight units that times the scale. A dense D, which starts at 0, is at
most s by itself. Where the bound stays below, no code moves whatever the data say, and only scales train: a
LoRA's 2e-4 for 30 steps is such a rate.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ..grid import PackedWeight
from .attach import adapted_layers
from .base import Adapter, LowRankOptions
from .dense import held_short


@dataclass(frozen=True)
class Reach:
    """layers: how many have a D; still: in how many no code can move; needed: the sum of rates from which on
    one can in half of them."""

    layers: int
    still: int
    needed: float


def reach(model: nn.Module, total_rate: float, gathers: float = 1.0) -> Reach | None:
    """For the layers that have adapters on them; total_rate: the sum of the learning rates of all steps;
    gathers: how many times the distance to the next code a D without a master (dense.py) has to go, because
    Adam's average holds its steps until they are as large. None: something there moves codes otherwise than
    by a D that starts at 0. A layer none of whose rows train (ef_qat) is not counted.
    """
    needed = []
    for _, layer in adapted_layers(model):
        adapter, base = layer.adapter, layer.base
        if not isinstance(adapter, Adapter):
            return None
        config, factors = adapter.config, dict(adapter.named_parameters())
        if config.dense_delta and isinstance(base, PackedWeight):
            if "delta" in factors:
                if factors["delta"].any():
                    return None
                whole = held_short(config) == "none"  # and then every weight is half a step away
                needed.append(0.5 * gathers if whole else 0.5 / 2**base.grid.residual_bits)
            continue
        if not isinstance(config, LowRankOptions) or config.live_grid or not isinstance(base, PackedWeight):
            return None  # no such product, or the trained scale moves codes too
        if not config.rounds_codes or factors["B"].any():
            return None
        unit = 1.0 if config.delta_unit == "grid" else _smallest(base.scale.float().abs())
        distance = 0.5 / 2**base.grid.residual_bits * unit
        a0 = factors["A"].abs().max().item()
        needed.append((math.sqrt(a0**2 + 4 * distance / config.alpha) - a0) / 2)
    if not needed:
        return None
    return Reach(len(needed), sum(s > total_rate for s in needed), sorted(needed)[len(needed) // 2])


def _smallest(scale: Tensor) -> float:
    """The smallest scale of a layer; groups of (nearly) zeros aside, in which any rate moves codes."""
    return scale[scale > scale.median() / 100].min().item()
