"""Rows: which rows of the packed layers matter most, and how many each layer gets of a share of all."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..grid import Weight

TILE = 16  # rows come in multiples of it: the least that a tensor core multiplies with


def row_importance(weight: Weight, size: Tensor | None = None) -> Tensor:
    """Mean |w| of every row, fp32 [N], of the weight that ships; with size [K], of the inputs, mean |w| size.

    One dense layer, [N, K] fp32, is held meanwhile.
    """
    dense = weight.dequantize().abs_()
    return dense.mean(1) if size is None else dense @ size / dense.shape[1]


def highest(importance: Tensor, count: int) -> Tensor:
    """The numbers of the `count` rows of the highest importance, int64, rising; of equal ones the first."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def in_tiles(wanted: float, n: int, least: int) -> int:
    """The nearest multiple of TILE, at least `least`, at most all n rows."""
    return min(n, max(least, round(wanted / TILE) * TILE))


def allotted(
    layers: Mapping[str, tuple[Tensor, tuple[int, int]]], share: float, scope: str, least: int
) -> dict[str, int]:
    """How many rows each layer gets. layers: name -> (importance [N], shape).

    network: of `share` of all rows, those above one threshold, in tiles and at least `least` per layer.
    whole_layers: all rows of the layers whose weights matter most, as long as `share` of all weights lasts;
    one layer at least, and 0 for the others.
    """
    if scope == "whole_layers":
        ordered = sorted(layers, key=lambda name: -float(layers[name][0].mean()))
        budget = share * sum(n * k for _, (n, k) in layers.values())
        out = dict.fromkeys(layers, 0)
        for place, name in enumerate(ordered):
            n, k = layers[name][1]
            budget -= n * k
            if place and budget < 0:
                break
            out[name] = n
        return out
    assert scope == "network", scope
    together = torch.cat([importance.float().cpu() for importance, _ in layers.values()])
    chosen = torch.zeros(len(together), dtype=torch.bool)
    chosen[highest(together, round(share * len(together)))] = True
    counts = [int(part.sum()) for part in chosen.split([n for _, (n, _) in layers.values()])]
    return {
        name: in_tiles(count, n, least)
        for (name, (_, (n, _))), count in zip(layers.items(), counts, strict=True)
    }
