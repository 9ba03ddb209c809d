"""The contract of a vector code: a product of small scales, one per coordinate.

    h [..., L]  -place->  z [..., L]  -nearest->  digits [..., L]  -ids_of->  id = sum_i d_i prod_{j<i} n_j
                                  <-at-                       <-digits_of-

n_i levels in coordinate i, prod n_i codes, the first coordinate lowest: with two levels each, the digits are
bits and the id is their number, lowest bit first. `quantize` is the forward of a model: the point, with the
gradient of the identity from it to z (straight-through, arXiv 1308.3432), and the id.

Entropy. A vector is softly on all codes, p(c) ~ exp(-m |z - c|^2). The distance is a sum over coordinates,
so p is a product of small softmaxes, and its entropy a sum of theirs: exact, without a table of all codes. Of
the mean of p over vectors only the factors are kept, which gives a bound from above (its entropy, were the
bits independent).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..grid.estimators import straight_through

MOST_BITS = 62  # of an id, which is an int64


@dataclass(frozen=True)
class Entropy:
    """In nats. vector: mean over the vectors of the entropy of each; codebook: of the mean over the vectors,
    coordinate by coordinate."""

    vector: Tensor
    codebook: Tensor

    @property
    def loss(self) -> Tensor:
        """What is minimised: each vector sure of its code, and all codes used (arXiv 2310.05737)."""
        return self.vector - self.codebook


@dataclass(frozen=True, kw_only=True)
class VectorCode(ABC):
    """A fact without tensors, hashable and JSON-able."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def metric(self) -> float:
        """m, of a squared distance in the units of `place`."""

    @property
    @abstractmethod
    def levels(self) -> tuple[int, ...]:
        """How many points each coordinate has."""

    @abstractmethod
    def place(self, h: Tensor) -> Tensor:
        """h [..., L] -> z [..., L]: where between the points a vector stands, differentiable."""

    @abstractmethod
    def nearest(self, z: Tensor) -> Tensor:
        """z [..., L] -> digits int64 [..., L], each in 0..levels-1."""

    @abstractmethod
    def at(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        """digits [..., L] -> the points in the units of `place`, [..., L]."""

    def scaled(self, z: Tensor) -> Tensor:
        """From the units of `place` to those of what is handed on."""
        return z

    @property
    def width(self) -> int:
        """L, coordinates of a vector."""
        return len(self.levels)

    @property
    def size(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)

    @property
    def id_bits(self) -> float:
        """Bits that an id is worth."""
        return math.log2(self.size)

    def quantize(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [..., L] -> (the point [..., L] with a straight-through gradient to h, ids int64 [...])."""
        z = self.place(self._fits(h))
        digits = self.nearest(z.detach())
        return self.scaled(straight_through(z, self.at(digits, z.dtype))), self.ids_of(digits)

    def encode(self, h: Tensor) -> Tensor:
        """h [..., L] -> ids int64 [...]."""
        with torch.no_grad():
            return self.ids_of(self.nearest(self.place(self._fits(h))))

    def decode(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """ids [...] -> points [..., L], those of `quantize` bit for bit. ValueError for an id there is
        not."""
        return self.scaled(self.at(self.digits_of(ids), dtype))

    def ids_of(self, digits: Tensor) -> Tensor:
        """digits int64 [..., L] -> ids int64 [...], the first coordinate lowest."""
        return (digits * torch.tensor(self._strides, device=digits.device)).sum(-1)

    def digits_of(self, ids: Tensor) -> Tensor:
        """The inverse of `ids_of`. ValueError for an id there is not."""
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"codes: got {str(ids.dtype).removeprefix('torch.')}; they are integers")
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < self.size):
            wrong = ids[(ids < 0) | (ids >= self.size)].flatten()[0]
            raise ValueError(f"codes: got {int(wrong)}; {self} has 0 to {self.size - 1}")
        strides, levels = (torch.tensor(x, device=ids.device) for x in (self._strides, self.levels))
        return ids.to(torch.int64)[..., None].div(strides, rounding_mode="floor") % levels

    def log_chances(self, h: Tensor) -> list[Tensor]:
        """log p of the points of each coordinate, [..., levels_i] for each i, in fp32 (of doubles,
        doubles)."""
        z = self.place(self._fits(h))
        z = z if z.dtype == torch.float64 else z.float()
        found = []
        for i, count in enumerate(self.levels):
            digits = torch.arange(count, device=h.device)[:, None].expand(count, self.width)
            points = self.at(digits, z.dtype)[:, i]
            found.append((-self.metric * (z[..., i, None] - points) ** 2).log_softmax(-1))
        return found

    def entropy(self, h: Tensor, counted: Tensor | None = None) -> Entropy:
        """h [..., L]; counted bool [...]: which vectors count, None: all. ValueError for no vector."""
        if not h.numel():
            raise ValueError("entropy: got no vector; at least one")
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        weight = h.new_ones(h.shape[:-1], dtype=dtype) if counted is None else counted.to(dtype)
        weight = (weight / weight.sum().clamp_min(1)).flatten()
        vector = codebook = h.new_zeros((), dtype=dtype)
        for log_p in self.log_chances(h):
            log_p = log_p.flatten(0, -2)
            p = log_p.exp()
            vector = vector - weight @ (p * log_p).sum(-1)
            # what nobody is on has no entropy, and would have an endless gradient
            codebook = codebook + torch.special.entr((weight @ p).clamp_min(torch.finfo(dtype).tiny)).sum()
        return Entropy(vector, codebook)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name, **asdict(self)}

    @property
    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.levels[:i]) for i in range(self.width))

    def _fits(self, h: Tensor) -> Tensor:
        if not h.is_floating_point() or not h.ndim or h.shape[-1] != self.width:
            raise ValueError(
                f"{self}: got a {str(h.dtype).removeprefix('torch.')} tensor of shape {list(h.shape)}; needs "
                f"floating numbers whose last dimension is {self.width}"
            )
        return h


def require_width(bits: object) -> None:
    """ValueError unless `bits` is a number of bits that an id may have."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits: got {bits!r}; allowed are 1 to {MOST_BITS}, for an id is an int64")
