"""Which packed layer takes the place of which dense one: whoever packs, loads or plans a model asks here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..grid import Weight
from .conv import PackedConv2d, is_conv, matrix_of
from .linear import PackedEmbedding, PackedLinear


def packed_in_place_of(
    dense: nn.Module, base: Weight, bias: Tensor | None, dtype: torch.dtype
) -> PackedLinear:
    """The packed layer. bias: where the dense one has one; dtype: that of the model."""
    if isinstance(dense, nn.Embedding):
        return PackedEmbedding.in_place_of(dense, base, dtype)
    if isinstance(dense, nn.Conv1d | nn.Conv2d):
        return PackedConv2d.in_place_of(dense, base, bias, dtype)
    return PackedLinear(base, bias)


def matrix_shape(dense: nn.Module) -> tuple[int, ...] | None:
    """[N, K] of what a dense layer multiplies with, or looks up; None: it is none that can be packed."""
    if isinstance(dense, nn.Linear | nn.Embedding):
        return tuple(dense.weight.shape)
    if is_conv(dense) and isinstance(weight := dense._parameters.get("weight"), Tensor):
        return tuple(matrix_of(weight).shape)
    return None
