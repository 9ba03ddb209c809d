"""kind: block. A float16 scale for every 32 numbers of a head: llama.cpp's --cache-type-k / -v q8_0 and q4_0.

    8 bits   d = max|x| / 127            code = round(x / d), halves away from zero
    4 bits   d = (the x of max|x|) / -8  code = floor(x / d + 8.5), at most 15

The code is made with the float32 d, and multiplied with the float16 one that is stored. In gguf files of some
models the numbers of a key are in another order, and so are those that share a block: x0, x_d/2, x1, ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..model.roles import NEIGHBOURS
from .codec import Codec, away

BLOCK = 32


@dataclass(frozen=True)
class Block(Codec):
    """neighbours: these are keys whose halves llama.cpp keeps as neighbours."""

    neighbours: bool = False

    name = "block"
    zero_point = False

    def of_keys(self, model_type: str) -> Self:
        return replace(self, neighbours=model_type in NEIGHBOURS)

    def rows(self, x: Tensor) -> Tensor:
        if self.neighbours:
            x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return x.unflatten(-1, (-1, BLOCK))

    def heads(self, rows: Tensor, heads: int) -> Tensor:
        x = rows.flatten(-2)
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.neighbours else x

    def scales(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.bits == 8:
            scale = rows.abs().amax(-1, keepdim=True) / 127
            return away(rows * _inverse(scale)) + 128, scale.half()
        largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        return torch.trunc(rows * _inverse(scale) + 8.5).clamp(0, 15), scale.half()

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (codes - (1 << (self.bits - 1))) * scale.float()

    def row(self, heads: int, dim: int) -> tuple[int, torch.dtype]:
        return BLOCK, torch.float16

    def reject(self, heads: int, dim: int) -> str | None:
        if dim % BLOCK:
            return f"has blocks of {BLOCK} numbers, and head_dim is {dim}; set kind: token_head"
        return None


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)
