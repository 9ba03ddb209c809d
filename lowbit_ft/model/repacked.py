"""Repacked: a packed weight once more as a kernel of this CPU reads it, and which tensors it was made of.

Which kernel is the layer's (model/linear.py); nothing here is a part of its state.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit_kernels import Int4Weight, Int8Weight, fits_int4, fits_int8, has_int8, int4_weight, int8_weight
from torch import Tensor

from ..grid import IntGrid, PackedWeight, Weight


def holds_int4(base: Weight) -> bool:
    """Whether PyTorch's int4 kernel can hold this weight."""
    grid = base.grid
    if not (isinstance(base, PackedWeight) and isinstance(grid, IntGrid)):
        return False
    return fits_int4(base.shape, grid.bits, grid.group_size, base.scale.dtype, base.offset is not None)


def holds_int8(base: Weight) -> bool:
    """Whether its codes are bytes that this CPU multiplies with bytes."""
    grid = base.grid
    if not (isinstance(base, PackedWeight) and isinstance(grid, IntGrid)) or not has_int8():
        return False
    zero, offset = base.zero is not None, base.offset is not None
    return fits_int8(base.shape, grid.bits, grid.group_size, zero, offset)


@dataclass(frozen=True)
class Repacked:
    """What a kernel reads (None: it cannot hold this weight), and which tensors at which version it was made
    of."""

    weight: Int4Weight | Int8Weight | None
    integers: bool
    tensors: list[Tensor]
    versions: list[int]

    @classmethod
    def make(cls, base: Weight, integers: bool) -> Repacked:
        """integers: bytes for inputs that are codes; else what the int4 kernel reads."""
        tensors, weight = list(base.to_tensors().values()), None
        if any(tensor.is_inference() for tensor in tensors):
            # made under torch.inference_mode: nothing tells when they are written to, so nothing is kept
            tensors = []
        elif holds_int8(base) if integers else holds_int4(base):
            assert isinstance(base, PackedWeight)
            repack = int8_weight if integers else int4_weight
            grid = base.grid
            weight = repack(base.codes, base.scale, base.zero, grid.bits, base.shape[1], grid.group_size)
        return cls(weight, integers, tensors, [tensor._version for tensor in tensors])

    def made_of(self, tensors: list[Tensor | None]) -> bool:
        """Whether these are the tensors it was made of, unchanged since."""
        if len(tensors) != len(self.tensors):
            return False
        return all(
            a is b and b._version == v for a, b, v in zip(tensors, self.tensors, self.versions, strict=True)
        )
