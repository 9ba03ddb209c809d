"""What quant.rotation changes of what a plan counts: a tied head becomes a matrix of its own, and a Hadamard
stands before the linears of r4."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..recipe.recipe import Recipe
from ..recipe.sections.quant import QuantSection
from ..rotations import OnlineHadamard, structure_of
from .beside import ends_of


def online_layers(recipe: Recipe, dense: Any) -> frozenset[str]:
    """The linears with a Hadamard before them (of kind adaptive: at most these). ValueError where the model
    cannot be turned or smoothed as asked."""
    quant = recipe.quant
    if not quant.folds:
        return frozenset()
    structure, sites = structure_of(dense, dense.config), quant.rotation.sites
    on = [quant.rotation.turns and wanted for wanted in (sites.r1, sites.r2, sites.r4)]
    if problems := structure.problems(*on, smooth=quant.smooth is not None):
        raise ValueError("\n".join(problems))
    return frozenset(name for layer in structure.layers for name in layer.down if on[2])


def put_online(module: nn.Module, prefix: str, layers: frozenset[str]) -> None:
    """The Hadamards of a decoder layer that is called `prefix` in the model."""
    for name in layers:
        if name.startswith(prefix):
            layer: Any = module.get_submodule(name.removeprefix(prefix))
            if hasattr(layer, "input_transform"):
                layer.input_transform = OnlineHadamard()


def untie(recipe: Recipe, rest: Any) -> bool:
    """Give a head that is tied its own matrix, where r1 does; returns whether it did."""
    embedding, head = ends_of(rest)
    turned = recipe.quant.rotation.turns and recipe.quant.rotation.sites.r1
    if not turned or head is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(torch.empty_like(embedding.weight), requires_grad=False)
    return True


def folded(quant: QuantSection) -> str:
    """What is folded into the weights before they are packed, to follow the calibrator; "": nothing."""
    text = ""
    if quant.rotation.turns:
        sites = ", ".join(site for site, wanted in quant.rotation.sites if wanted)
        text = f", rotation {quant.rotation.kind} of {sites}"
    return text if quant.smooth is None else f"{text}, smooth {quant.smooth}"
