"""A weight on its grid, packed: PackedWeight (integers) and BinaryWeight (sign planes). Frozen tensors and
arithmetic, no modules.

Both answer the same verbs, so adapters, merge and exporters need to know nothing else about a base:

    linear(x, args)   the layer's output; args (GridArgs / PlaneArgs) is what an adapter wants of the grid,
                      None the base itself
    merged(args)      a new weight holding exactly the codes and scales that linear(x, args) used
    dequantize(dtype) the dense weight, bit for bit what linear multiplies x with in that dtype
    to_tensors / from_tensors   plain named tensors for safetensors files and module buffers
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lowbit_kernels as kernels
import torch
from lowbit_kernels.grid import GridWeight
from lowbit_kernels.layout import row_chunks
from torch import Tensor

from .binary import BinaryGrid
from .integer import IntGrid
from .tensors import Tensors, expect


@dataclass(frozen=True, kw_only=True)
class GridArgs:
    """What an adapter asks of an integer base. Shapes [G, N] unless said; see lowbit_kernels/codes.py for the
    equation.
    """

    scale: Tensor  # S, already rounded to the shipping dtype
    zero: Tensor | None  # z, integers; None = 2^(bits-1)
    offset: Tensor | None = None  # T
    a: Tensor | None = None  # [r, K]
    b: Tensor | None = None  # [N, r]
    delta: Tensor | None = None  # [R, K] in grid steps, instead of a and b
    rows: Tensor | None = None  # int64 [R]: whose delta it is; None: of all rows
    codes: Tensor | None = None  # [N, W]: the codes to start from; None: the base's
    from_codes: bool = False  # D counts from the codes: the base's residual is left out
    gain: float = 1.0
    units: str = "grid"
    unit: Tensor | None = None  # [G, N]: what D is counted in, of units "weight"; None: the base's scale
    clip_first: bool = False
    mask: Tensor | None = None  # int16 [N, W_1]: zeros that came while training; None: the base's
    ships_offset: bool = False  # T is a real offset (not only a path for the zero point's gradient)
    low_rank_gradient: str = "exact"  # of A and B: see lowbit_kernels/estimates.py
    scale_grad_tokens: float = 1.0  # the share of the tokens that scales and offsets learn from

    @property
    def moves(self) -> bool:
        """Whether the codes are made anew by every forward."""
        return self.a is not None or self.delta is not None or self.units == "live"

    def with_rows(self, delta: Tensor, rows: Tensor, codes: Tensor | None) -> "GridArgs":
        """The same, with a dense part of these rows on these codes."""
        return replace(self, delta=delta, rows=rows, codes=codes)


@dataclass(frozen=True, kw_only=True)
class PlaneArgs:
    """What an adapter asks of a binary base: scale [q, G, N]."""

    scale: Tensor


@dataclass(frozen=True, kw_only=True)
class PackedWeight(Tensors):
    """Integers on an IntGrid. codes int16 [N, W] and residual int16 [N, W_f] in P16, scale [G, N], zero uint8
    [G, N] | None, offset [G, N] | None (only a merged L4Q with a float offset has one), mask int16 [N, W_1] |
    None (1 where a weight is zero and stays it: its code is the zero point), shape (N, K)."""

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    grid: IntGrid
    residual: Tensor | None = None
    zero: Tensor | None = None
    offset: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def quantize(cls, weight: Tensor, scale: Tensor, zero: Tensor | None, grid: IntGrid) -> "PackedWeight":
        """Round weight [N, K] onto the grid given by scale and zero [G, N]; the residual is what rounding
        threw away. A grid's mask is not known here: `masked` puts it in.
        """
        n, k = weight.shape
        kept = scale.to(getattr(torch, grid.scale_dtype)).contiguous()
        zeros = None if zero is None else zero.to(torch.uint8).contiguous()
        codes, residual = kernels.quantize_pack(
            weight, kept, zeros, grid.bits, grid.group_size, grid.residual_bits
        )
        return cls(
            codes=codes,
            residual=residual if grid.residual_bits else None,
            scale=kept,
            zero=zeros,
            shape=(n, k),
            grid=replace(grid, mask=False),
        )

    def masked(self, zeros: Tensor) -> "PackedWeight":
        """The same with these weights (bool [N, K]) locked at zero, which they are. ValueError where one is
        not."""
        made = replace(self, mask=kernels.pack(zeros.to(torch.uint8), 1), grid=replace(self.grid, mask=True))
        made.check_mask()
        return made

    @property
    def locked(self) -> Tensor | None:
        """Which weights are zero and stay it, bool [N, K]; None: the grid has no mask."""
        return None if self.mask is None else kernels.unpack(self.mask, 1, self.shape[1]).bool()

    def check_mask(self) -> None:
        """ValueError where a weight that the mask calls zero is not."""
        if self.mask is None:
            return
        for rows in row_chunks(*self.shape):
            part = self.rows(rows.start, min(rows.stop, self.shape[0]))
            zeros = part.locked
            assert zeros is not None
            if (wrong := int((zeros & (part.dequantize() != 0)).sum())) > 0:
                raise ValueError(f"mask: {wrong} of {int(zeros.sum())} weights that it calls zero are not")

    def check_narrow(self) -> None:
        """ValueError where a narrow grid's lowest code is used."""
        if self.grid.narrow and (wrong := int((self.unpack_codes() < self.grid.lowest).sum())) > 0:
            raise ValueError(f"codes: {wrong} are 0, the lowest, which grid {self.grid} leaves unused")

    @classmethod
    def specs(
        cls, shape: tuple[int, int], grid: IntGrid, offset: bool = False
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every tensor a weight of this shape and grid has."""
        n, k = shape
        groups = (kernels.group_count(k, grid.group_size), n)
        scale_dtype = getattr(torch, grid.scale_dtype)
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((n, kernels.packed_width(k, grid.bits)), torch.int16),
            "scale": (groups, scale_dtype),
        }
        if grid.residual_bits:
            out["residual"] = ((n, kernels.packed_width(k, grid.residual_bits)), torch.int16)
        if not grid.symmetric:
            out["zero"] = (groups, torch.uint8)
        if offset:
            out["offset"] = (groups, scale_dtype)
        if grid.mask:
            out["mask"] = ((n, kernels.packed_width(k, 1)), torch.int16)
        return out

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], grid: IntGrid
    ) -> "PackedWeight":
        """The inverse of to_tensors. ValueError when a tensor is missing, unknown or of the wrong shape or
        dtype.
        """
        wanted = cls.specs(shape, grid, offset="offset" in tensors)
        if set(wanted) != set(tensors):
            raise ValueError(f"packed weight {grid}: got tensors {sorted(tensors)}; needs {sorted(wanted)}")
        for name, (size, dtype) in wanted.items():
            expect(name, tensors[name], size, (dtype,))
        return cls(shape=shape, grid=grid, **tensors)

    def linear(self, x: Tensor, args: GridArgs | None = None, step_codes: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]. step_codes: what `codes_of(args)` gives, if it is there already."""
        g = self.grid
        if args is None:
            return kernels.packed_matmul(
                x, self.codes, self.scale, self.zero, self.offset, g.bits, g.group_size
            )
        estimated = (args.low_rank_gradient, args.scale_grad_tokens)
        return kernels.grid_linear(
            x, *self.on_grid(args), g.group_size, args.clip_first, step_codes, *estimated
        )

    def on_grid(self, args: GridArgs) -> GridWeight:
        """The weight that args ask for, as the grid ops take it."""
        codes, unit = self.codes if args.codes is None else args.codes, args.unit
        mask = self.mask if args.mask is None else args.mask
        residual = None if args.from_codes else self.residual
        base = (codes, residual, self.scale if unit is None else unit, self.zero)
        moved = (args.a, args.b, args.delta, args.rows)
        trained = (args.scale, args.zero, args.offset, mask, args.gain, args.units)
        fraction = 0 if residual is None else self.grid.residual_bits
        return GridWeight(*base, *moved, *trained, self.grid.bits, fraction, self.grid.lowest)

    @torch.no_grad()
    def codes_of(self, args: GridArgs) -> Tensor:
        """The packed codes that linear(x, args) multiplies with, int16 [N, W]."""
        return kernels.grid_codes(*self.on_grid(args), self.shape[1], self.grid.group_size)

    @torch.no_grad()
    def merged(self, args: GridArgs) -> "PackedWeight":
        """The weight that linear(x, args) multiplied with, as integers: the same op makes the codes."""
        g, codes = self.grid, self.codes_of(args)
        dtype = getattr(torch, g.scale_dtype)
        scale = args.scale.detach().to(dtype)
        assert torch.equal(scale.float(), args.scale.detach().float()), (
            "scales must be rounded before the forward"
        )
        offset = None
        if args.ships_offset and args.offset is not None:
            offset = args.offset.detach().to(dtype)
            assert torch.equal(offset.float(), args.offset.detach().float()), (
                "offsets must be rounded before the forward"
            )
        zero = None if args.zero is None else args.zero.detach().to(torch.uint8)
        grid = replace(g.deployed, symmetric=zero is None)
        return PackedWeight(codes=codes, scale=scale, zero=zero, offset=offset, shape=self.shape, grid=grid)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * (code - zero) + offset, [N, K]. The residual plays no part: it is not a part of the
        deployed weight.
        """
        g, k = self.grid, self.shape[1]
        return kernels.dequantize(
            self.codes, self.scale, self.zero, self.offset, g.bits, k, g.group_size, dtype
        )

    def linear_unrounded(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] with codes + residual; codes alone where no residual is kept. With a mask,
        whose zeros the residual would move by a part of a step, by the dense weight, made for this call."""
        if self.mask is not None and self.residual is not None:
            return torch.nn.functional.linear(x, self.dequantize_unrounded(x.dtype))
        y, rest = self.linear(x), self._rest()
        if rest is None:
            return y
        return y + kernels.packed_matmul(x, *rest, self.grid.residual_bits, self.grid.group_size)

    def dequantize_unrounded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of `linear_unrounded`, [N, K], rounded to dtype once."""
        weight, rest, g = self.dequantize(), self._rest(), self.grid
        if rest is not None:
            weight += kernels.dequantize(*rest, g.residual_bits, self.shape[1], g.group_size, torch.float32)
        if (zeros := self.locked) is not None:
            weight.masked_fill_(zeros, 0)
        return weight.to(dtype)

    def _rest(self) -> tuple[Tensor, Tensor, None, Tensor] | None:
        """(codes, scale, zero, offset) of the residual as a packed weight: s0 ((e + 1/2) / 2^f - 1/2) =
        s0 / 2^f (e - 2^(f-1)) + s0 / 2^(f+1). Powers of two: exact in the dtype of s0."""
        if self.residual is None:
            return None
        step = self.scale / (1 << self.grid.residual_bits)
        return self.residual, step, None, step / 2

    def unpack_codes(self) -> Tensor:
        """uint8 [N, K]."""
        return kernels.unpack(self.codes, self.grid.bits, self.shape[1])

    def rows(self, first: int, last: int) -> "PackedWeight":
        """Rows [first, last) of the matrix, as a weight of their own: groups lie along K, so nothing is
        rounded anew.
        """
        return self.chosen(torch.arange(first, last, device=self.codes.device))

    def chosen(self, rows: Tensor) -> "PackedWeight":
        """These rows [R] of the matrix, in this order, as a weight of their own."""
        by_row = ("codes", "residual", "mask")
        tensors = {
            name: t.index_select(0 if name in by_row else 1, rows) for name, t in self.to_tensors().items()
        }
        return PackedWeight(shape=(len(rows), self.shape[1]), grid=self.grid, **tensors)

    def without_residual(self) -> "PackedWeight":
        """What ships: without what only training reads, whose effect is in the codes."""
        return replace(self, residual=None, mask=None, grid=self.grid.deployed)


@dataclass(frozen=True, kw_only=True)
class BinaryWeight(Tensors):
    """Sign planes on a BinaryGrid. planes int16 [q, N, W] (P16, 1 bit), scale [q, G, N], shape (N, K)."""

    planes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    grid: BinaryGrid

    @classmethod
    def pack(cls, signs: Tensor, scale: Tensor, grid: BinaryGrid) -> "BinaryWeight":
        """signs uint8 [q, N, K] in {0, 1} (1 is +1), scale [q, G, N]."""
        planes = torch.stack([kernels.pack(plane, 1) for plane in signs])
        kept = scale.to(getattr(torch, grid.scale_dtype)).contiguous()
        return cls(planes=planes, scale=kept, shape=(signs.shape[1], signs.shape[2]), grid=grid)

    @classmethod
    def specs(
        cls, shape: tuple[int, int], grid: BinaryGrid, offset: bool = False
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        return {
            "planes": ((grid.bits, n, kernels.packed_width(k, 1)), torch.int16),
            "scale": (
                (grid.bits, kernels.group_count(k, grid.group_size), n),
                getattr(torch, grid.scale_dtype),
            ),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], grid: BinaryGrid
    ) -> "BinaryWeight":
        """The inverse of to_tensors. ValueError when a tensor is missing, unknown or of the wrong shape or
        dtype.
        """
        wanted = cls.specs(shape, grid)
        if set(wanted) != set(tensors):
            raise ValueError(f"binary weight {grid}: got tensors {sorted(tensors)}; needs {sorted(wanted)}")
        for name, (size, dtype) in wanted.items():
            expect(name, tensors[name], size, (dtype,))
        return cls(shape=shape, grid=grid, **tensors)

    def linear(self, x: Tensor, args: PlaneArgs | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        return kernels.binary_matmul(x, self.planes, (args or self).scale, None, self.grid.group_size)

    @torch.no_grad()
    def merged(self, args: PlaneArgs) -> "BinaryWeight":
        scale = args.scale.detach().to(self.scale.dtype)
        assert torch.equal(scale.float(), args.scale.detach().float()), (
            "scales must be rounded before the forward"
        )
        return replace(self, scale=scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return kernels.binary_dequantize(
            self.planes, self.scale, None, self.shape[1], self.grid.group_size, dtype
        )

    def linear_unrounded(self, x: Tensor) -> Tensor:
        """As `linear`: sign planes keep no residual."""
        return self.linear(x)

    def dequantize_unrounded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `dequantize`: sign planes keep no residual."""
        return self.dequantize(dtype)

    def unpack_codes(self) -> Tensor:
        """uint8 [q, N, K] in {0, 1}."""
        return torch.stack([kernels.unpack(plane, 1, self.shape[1]) for plane in self.planes])

    def rows(self, first: int, last: int) -> "BinaryWeight":
        """Rows [first, last) of the matrix, as a weight of their own."""
        return self.chosen(torch.arange(first, last, device=self.planes.device))

    def chosen(self, rows: Tensor) -> "BinaryWeight":
        """These rows [R] of the matrix, in this order, as a weight of their own."""
        planes, scale = self.planes.index_select(1, rows), self.scale.index_select(2, rows)
        return BinaryWeight(planes=planes, scale=scale, shape=(len(rows), self.shape[1]), grid=self.grid)

    def without_residual(self) -> "BinaryWeight":
        return self


Weight = PackedWeight | BinaryWeight
WEIGHTS: dict[str, type[PackedWeight] | type[BinaryWeight]] = {  # by the kind of the grid
    "integer": PackedWeight,
    "binary": BinaryWeight,
}


def stack_rows(parts: Sequence[Weight]) -> Weight:
    """Weights of one grid and K, one below the other: the inverse of `rows`."""
    first = parts[0]
    if len(parts) == 1:
        return first
    along = {
        "codes": 0,
        "residual": 0,
        "mask": 0,
        "planes": 1,
        "scale": 2 if isinstance(first, BinaryWeight) else 1,
        "zero": 1,
        "offset": 1,
    }
    tensors = {
        name: torch.cat([part.to_tensors()[name] for part in parts], along[name])
        for name in first.to_tensors()
    }
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    return type(first)(shape=shape, grid=first.grid, **tensors)  # pyright: ignore[reportArgumentType, reportCallIssue]


def empty_weight(
    shape: tuple[int, int], grid: Any, device: torch.device | str, offset: bool = False
) -> Weight:
    """A weight whose tensors are still to be filled (a checkpoint is about to be read into them)."""
    kind = WEIGHTS[grid.kind]
    tensors = {
        n: torch.empty(s, dtype=d, device=device) for n, (s, d) in kind.specs(shape, grid, offset).items()
    }
    return kind.from_tensors(tensors, shape, grid)
