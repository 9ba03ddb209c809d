"""fsq: finite scalar quantization, n_i levels in coordinate i (arXiv 2309.15505).

    z = tanh(h + s) a - o,  a = (n - 1)(1 - eps) / 2,  o = 1/2 for even n, else 0,  s = atanh(o / a)
    z^ = round(z) / floor(n / 2)          digit = round(z) + floor(n / 2)

s puts h = 0 on 0 for an even number of levels too. Three levels at the least: with two, o is beyond a. It
needs no entropy term to use its codes; there is one all the same, to measure by: its steps are taken as 2
long, as those of lfq are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import MOST_BITS, VectorCode

EPS = 1e-3  # how far the bound stays inside the outermost rounding
MOST_LEVELS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FSQ(VectorCode):
    """counts: levels of each coordinate. The default is the paper's for about 2^14 codes (table 1)."""

    name: ClassVar[str] = "fsq"

    counts: tuple[int, ...] = (8, 8, 8, 6, 5)

    def __post_init__(self) -> None:
        given: Any = self.counts
        found = tuple(given) if isinstance(given, list | tuple) else ()
        good = found and all(type(n) is int and 3 <= n <= MOST_LEVELS for n in found)
        if not good or math.prod(found) > 1 << MOST_BITS:
            raise ValueError(
                f"counts: got {given!r}; needs a list of levels per coordinate, each 3 to {MOST_LEVELS}, "
                f"at most 2^{MOST_BITS} codes together"
            )
        object.__setattr__(self, "counts", found)

    @property
    def levels(self) -> tuple[int, ...]:
        return self.counts

    @property
    def metric(self) -> float:
        return 4.0

    def place(self, h: Tensor) -> Tensor:
        count = self._each(h, lambda n: n)
        reach = (count - 1) * (1 - EPS) / 2
        offset = self._each(h, lambda n: 0.0 if n % 2 else 0.5)
        return torch.tanh(h + torch.atanh(offset / reach)) * reach - offset

    def nearest(self, z: Tensor) -> Tensor:
        half, top = (
            torch.tensor([of(n) for n in self.counts], device=z.device)
            for of in (lambda n: n // 2, lambda n: n - 1)
        )
        # in bfloat16 the bound of many levels is rounded to one beyond the last
        return (z.round().long() + half).clamp_min(0).minimum(top)

    def at(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        half = torch.tensor([n // 2 for n in self.counts], device=digits.device)
        return (digits - half).to(dtype)

    def scaled(self, z: Tensor) -> Tensor:
        return z / self._each(z, lambda n: n // 2)

    def __str__(self) -> str:
        return f"fsq of {' x '.join(map(str, self.counts))} levels"

    def _each(self, like: Tensor, of: Any) -> Tensor:
        """A number of each coordinate's count, [L]."""
        return torch.tensor([of(n) for n in self.counts], dtype=like.dtype, device=like.device)
