"""bsq and lfq: a bit per coordinate, the sign.

    bsq   u = h / |h|        u^ = sign(u) / sqrt(L)       on the sphere      arXiv 2406.07548
    lfq                      h^ = sign(h)                 on the cube        arXiv 2310.05737

sign(0) = +1 in both. The gradient of bsq's step is that of u / sqrt(L). Of bsq |u - u^| <= sqrt(2 - 2 /
sqrt(L)), so it needs no commitment loss; lfq's distance has no bound. p(bit i) = sigmoid(4 u_i / sqrt(L)),
and of lfq sigmoid(4 h_i).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import VectorCode, require_width


@dataclass(frozen=True, kw_only=True)
class _Signs(VectorCode):
    """A bit per coordinate, whose points are -1 and +1."""

    bits: int = 14

    def __post_init__(self) -> None:
        require_width(self.bits)

    @property
    def levels(self) -> tuple[int, ...]:
        return (2,) * self.bits

    def nearest(self, z: Tensor) -> Tensor:
        return (z >= 0).long()

    def at(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        return (2 * digits - 1).to(dtype)

    def __str__(self) -> str:
        return f"{self.name} of {self.bits} bits"


@dataclass(frozen=True, kw_only=True)
class BSQ(_Signs):
    """Binary spherical quantization. A vector of zeros is at the code of all ones."""

    name: ClassVar[str] = "bsq"

    @property
    def metric(self) -> float:
        return 1 / math.sqrt(self.bits)

    def place(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=-1)

    def scaled(self, z: Tensor) -> Tensor:
        return z / math.sqrt(self.bits)


@dataclass(frozen=True, kw_only=True)
class LFQ(_Signs):
    """Lookup-free quantization."""

    name: ClassVar[str] = "lfq"

    @property
    def metric(self) -> float:
        return 1.0

    def place(self, h: Tensor) -> Tensor:
        return h
