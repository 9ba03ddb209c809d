"""A grid for keys or values [B, heads, L, D]: what a row of the cache is, in numbers and in bytes.

    x  ->  (rotated)  ->  codes, scale per row  ->  bytes: codes (4-bit ones two to a byte), then the scale
    x^ =   (rotated back)  scale (code - zero)

`fake` is decode(encode(x)) without the bytes: the same operations on the same numbers, each of them element
by element or a sum in a fixed order, so training, prefill and one token at a time give the same bits. All is
computed in float32 and rounded once to the dtype of the model.

A rotation by an orthonormal H does not change what passes straight through: dx = H H dx^.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from lowbit_kernels.hadamard import hadamard
from torch import Tensor

FLOOR = 1e-6  # of a scale, as vLLM has it: a row of zeros is a row of zeros


@dataclass(frozen=True)
class Codec(ABC):
    """bits: 8 or 4. symmetric: no zero point. r3: a Hadamard of every head before anything else."""

    bits: int
    symmetric: bool
    r3: bool = False

    name: ClassVar[str]
    zero_point: ClassVar[bool] = True  # whether it can have one
    before_rope: ClassVar[bool] = False  # whether it may round what no cache keeps

    # ------------------------------------------------ what a kind says

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """float32 [B, heads, L, D] -> [B, heads or 1, L, r, n]: r rows of n numbers that share a scale."""

    def heads(self, rows: Tensor, heads: int) -> Tensor:
        """The inverse of `rows`."""
        return rows.flatten(-2)

    def scales(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [..., n] -> (codes, their whole numbers as floats; scale [..., 1] as it is stored)."""
        top = (1 << self.bits) - 1
        if self.symmetric:
            half = 1 << (self.bits - 1)
            scale = (rows.abs().amax(-1, keepdim=True) / (half - 1)).clamp_min(FLOOR)
            return away(rows * (1 / scale)).clamp(-half, half - 1) + half, scale
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        scale = ((high - low) / top).clamp_min(FLOOR)
        zero = away(-low / scale).clamp(0, top)
        codes = away(rows * (1 / scale) + zero).clamp(0, top)
        return codes, with_zero(scale, zero, top)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """codes [..., n] (floats), scale [..., 1] -> rows."""
        top = (1 << self.bits) - 1
        if self.symmetric:
            return (codes - (1 << (self.bits - 1))) * scale
        stored = scale.view(torch.int32)
        return (codes - (stored & top)) * (stored & ~top).view(torch.float32)

    @abstractmethod
    def reject(self, heads: int, dim: int) -> str | None:
        """Why heads of this size do not fit, with the way out; None when they do."""

    def row_bytes(self, heads: int, dim: int) -> int:
        """Bytes of one token in one layer, of its keys or of its values."""
        x = torch.zeros(1, heads, 1, dim)
        return self.encode(x).numel()

    # ------------------------------------------------ what all kinds do

    def of_keys(self, model_type: str) -> Self:
        """The grid of the keys of this model, where its server keeps them in an order of its own."""
        return self

    def turned(self) -> Self:
        return replace(self, r3=True)

    def fake(self, x: Tensor) -> Tensor:
        return _Straight.apply(x, self)  # pyright: ignore[reportReturnType]

    def round(self, x: Tensor) -> Tensor:
        """x^, in x's dtype."""
        codes, scale = self.scales(self.rows(self._turn(x)))
        return self._back(self.heads(self.values(codes, scale), x.shape[1]), x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """[B, heads, L, D] -> uint8 [B, heads or 1, L, bytes]."""
        codes, scale = self.scales(self.rows(self._turn(x)))
        codes = codes.to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        made = torch.cat((codes, scale.contiguous().view(torch.uint8)), -1)
        return made.flatten(3)  # several rows of a head lie behind one another

    def decode(self, stored: Tensor, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        """The inverse: uint8 as `encode` made them -> x^ [B, heads, L, D]."""
        n, kept = self.row(heads, dim)
        width = n * self.bits // 8
        stored = stored.reshape(*stored.shape[:3], -1, width + kept.itemsize)
        codes, scale = stored[..., :width], stored[..., width:].contiguous().view(kept)
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        rows = self.values(codes.float(), scale)
        return self._back(self.heads(rows, heads), dtype)

    @abstractmethod
    def row(self, heads: int, dim: int) -> tuple[int, torch.dtype]:
        """(numbers that share a scale, dtype of the stored scale)."""

    # ------------------------------------------------ rotations

    def _turn(self, x: Tensor) -> Tensor:
        return hadamard(x.float(), x.shape[-1]) if self.r3 else x.float()

    def _back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (hadamard(x, x.shape[-1]) if self.r3 else x).to(dtype)


class _Straight(torch.autograd.Function):
    """x -> x^ forwards, the gradient as it is backwards; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codec: Codec) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return codec.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def away(x: Tensor) -> Tensor:
    """The nearest whole number, halves away from zero, as vLLM and llama.cpp round their caches."""
    return torch.trunc(x + torch.where(x < 0, -0.5, 0.5))


def with_zero(scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """A float32 scale whose lowest bits are the zero point 0..top: it costs no byte, and the scale at most
    2^-15 of itself (2^-19 at 4 bits)."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits & ~top) | zero.to(torch.int32)).view(torch.float32)
