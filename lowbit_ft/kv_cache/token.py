"""kind: token. One scale for the whole vector of a token, all heads together (LLM-QAT, arXiv 2305.17888).

    s = max|x| / (2^(bits-1) - 1)        x^ = s round(x / s)

LLM-QAT adds 1e-6 to the maximum where we keep s above 1e-6; it rounds the outputs of k_proj and v_proj,
before rotary embedding (where: before_rope), and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec


@dataclass(frozen=True)
class Token(Codec):
    name = "token"
    before_rope = True

    def rows(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)[:, None, :, None]

    def heads(self, rows: Tensor, heads: int) -> Tensor:
        return rows[:, 0, :, 0].unflatten(-1, (heads, -1)).transpose(1, 2)

    def row(self, heads: int, dim: int) -> tuple[int, torch.dtype]:
        return heads * dim, torch.float32

    def reject(self, heads: int, dim: int) -> str | None:
        if self.bits == 4 and heads * dim % 2:
            return f"packs two numbers to a byte, and a token has {heads * dim} of them; set bits: 8"
        return None
