"""exported: the bytes of exported/, as export.format lays its layers out and in the dtype its reader computes
in."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from ..adapters.base import Adapter
from ..export import EXPORTERS, LayerSpec
from ..export.base import Exporter
from ..export.planes import held
from ..grid import Grid, IntGrid
from ..model.linear import PackedLinear
from ..recipe.recipe import Recipe
from .model import Skeleton


def exported_bytes(recipe: Recipe, made: Skeleton) -> int:
    """Of its tensors; headers, the tokenizer and a graph without them are small beside."""
    exporter = EXPORTERS[recipe.export.format]
    size = (exporter.computes_in or getattr(torch, recipe.model.dtype)).itemsize
    layers = sum(len(block.indices) * _bytes(block.module, exporter, size, set()) for block in made.blocks)
    return layers + _bytes(made.model, exporter, size, set())


def _bytes(module: nn.Module, exporter: Exporter, size: int, seen: set[int]) -> int:
    """Of a module and what is in it, without adapters; tied parameters once. size: of a dense number."""
    if isinstance(module, Adapter):
        return 0
    own = sum(p.numel() for p in module.parameters(recurse=False) if id(p) not in seen) * size
    seen |= {id(p) for p in module.parameters(recurse=False)}
    if isinstance(module, PackedLinear):
        specs = exporter.specs(LayerSpec(module.base.shape, held(exporter, _shipped(module))))
        own += sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    return own + sum(_bytes(child, exporter, size, seen) for child in module.children())


def _shipped(layer: PackedLinear) -> Grid:
    if isinstance(adapter := layer.adapter, Adapter):
        return adapter.config.shipped(layer.grid)
    return layer.grid.deployed if isinstance(layer.grid, IntGrid) else layer.grid
