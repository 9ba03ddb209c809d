"""Tensors: what both kinds of weight (packed.py) share: tensors by name, a digest of them, their bytes."""

import hashlib
import json
from dataclasses import fields

import torch
from torch import Tensor

from .binary import BinaryGrid
from .integer import IntGrid


class Tensors:
    """to_tensors, digest, nbytes and the shape check, shared by both kinds of weight."""

    shape: tuple[int, int]
    grid: IntGrid | BinaryGrid

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    def digest(self) -> str:
        """sha256 over shape, grid, names, dtypes and bytes: two weights with one digest are the same bit for
        bit.
        """
        sha = hashlib.sha256(
            f"{tuple(self.shape)} {json.dumps(self.grid.to_json(), sort_keys=True)};".encode()
        )
        for name, tensor in sorted(self.to_tensors().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().data)
        return sha.hexdigest()


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless the tensor has this shape and one of these dtypes."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"{name}: got {tensor.dtype} {tuple(tensor.shape)}; this grid needs {wanted} {shape}"
        )
