"""kind: token_head. A scale per token and head.

8 bits, symmetric: what vLLM computes with --kv-cache-dtype int8_per_token_head: s = max|x| / 127, at least
1e-6, halves away from zero, codes -128..127 and a float32 scale.

4 bits, not symmetric: int4_per_token_head: keys and values are rotated first, x D H with signs D drawn from
a seed and H a Hadamard matrix of the largest power of two that divides head_dim, and brought back to the
dtype of the model; then s = (max - min) / 15, a zero point 0..15 that is kept in the lowest 4 bits of the
float32 scale. On a GPU vLLM rotates in bfloat16 where it has a kernel for it, so a code may differ there
where a value lies halfway. (Read in vLLM 0.32.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from lowbit_kernels.hadamard import hadamard
from torch import Tensor

from .codec import Codec


@dataclass(frozen=True)
class TokenHead(Codec):
    """signs: of the rotation of keys and values, one for each number of a block of Hadamard's matrix; none:
    they are not rotated. Numbers and no tensor, so that a compiler and tensors without data can have them."""

    signs: tuple[float, ...] = ()

    name = "token_head"

    def rows(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2)

    def row(self, heads: int, dim: int) -> tuple[int, torch.dtype]:
        return dim, torch.float32

    def reject(self, heads: int, dim: int) -> str | None:
        if self.bits == 4 and dim % 2:
            return f"packs two numbers to a byte, and head_dim {dim} is odd; set bits: 8"
        return None

    def _turn(self, x: Tensor) -> Tensor:
        if not self.signs:
            return super()._turn(x)
        return walsh(x.float() * self._signs(x), len(self.signs)).to(x.dtype).float()

    def _back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.signs:
            return super()._back(x, dtype)
        block = len(self.signs)
        return (walsh(x, block) * (self._signs(x) / block)).to(dtype)

    def _signs(self, x: Tensor) -> Tensor:
        return torch.tensor(self.signs, device=x.device).repeat(x.shape[-1] // len(self.signs))


def walsh(x: Tensor, block: int) -> Tensor:
    """x times the Hadamard matrix of +-1 on each run of `block` numbers, a power of two: sums alone, as
    vLLM makes them. The op divides by sqrt(block), which is undone without rounding where that is a power of
    two itself; else two halves are done, and the last sum here."""
    if block.bit_length() % 2:
        return hadamard(x, block) * block**0.5
    half = hadamard(x, block // 2).unflatten(-1, (-1, 2, block // 2)) * (block // 2) ** 0.5
    return torch.stack((half[..., 0, :] + half[..., 1, :], half[..., 0, :] - half[..., 1, :]), -2).flatten(-3)


@functools.cache
def vllm_signs(dim: int) -> tuple[float, ...]:
    """1 and -1, as many as the largest power of two that divides head_dim: the ones vLLM draws for its int4
    cache, from one seed, the same in every head and layer."""
    half = torch.full((dim & -dim,), 0.5)
    drawn = torch.bernoulli(half, generator=torch.Generator().manual_seed(0x9E3779B9))
    return tuple((2 * drawn - 1).tolist())
