"""What quant.sparsity.schedule adds to a plan: a bit per weight in every adapter, and the choice of zeros, a
matrix at a time, between two steps."""

from __future__ import annotations

from torch import nn

from ..adapters.pruned import Pruned
from ..quantize.memory import PRUNE_BYTES
from ..recipe.recipe import Recipe


def put_zeros(module: nn.Module, recipe: Recipe) -> None:
    """The bits of the layers in it that are pruned while they train."""
    gradual = recipe.quant.sparsity.gradual(1)
    if gradual is None:
        return
    for one in module.modules():
        if isinstance(one, Pruned):
            one.prune_by(gradual)


def choice_moments(recipe: Recipe, largest: int) -> list[tuple[int, str, dict[str, int]]]:
    """The choice of zeros in a matrix of so many weights, when there is nothing of a step (plan.py)."""
    if recipe.quant.sparsity.schedule is None:
        return []
    parts = {"saved layer inputs": 0, "gradients": 0, "workspace": PRUNE_BYTES * largest}
    return [(sum(parts.values()), "the choice of zeros", parts)]
