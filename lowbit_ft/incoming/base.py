"""What reads a packed checkpoint: settings from config.json, shapes from headers, one layer's integers at a
time.

Letters: N out features, K in features, G groups per row, g group size, b bits. W = scale * (code - zero) in
every format read here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import lowbit_kernels as kernels
import torch
from torch import Tensor

from ..files.tensorfile import TensorEntry, read_tensor
from ..grid import IntGrid, PackedWeight
from ..grid.estimators import SMALLEST_SCALE

SCALE_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class PackedLayer:
    """A packed layer of the files: what stands before ".qweight", its shape (N, K), its grid, and where its
    tensors lie.
    """

    name: str
    shape: tuple[int, int]
    grid: IntGrid
    parts: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Codes:
    """A layer unpacked: codes uint8 [N, K], scale [G, N] as stored, zero int [G, N] or None (2^(b-1)
    everywhere).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class Reader(ABC):
    """One packed format. Stateless."""

    method: ClassVar[str]  # quant_method of config.json
    parts: ClassVar[
        tuple[str, ...]
    ]  # local names of a layer's tensors; the first, the codes, is always there
    scale: ClassVar[str]  # the local name of the scales
    order: ClassVar[str] = ""  # the local name of the groups of the inputs, where the format has one

    @abstractmethod
    def check(self, config: Mapping[str, Any]) -> None:
        """ValueError when the settings ask for something that no grid of ours is."""

    @abstractmethod
    def layer(self, config: Mapping[str, Any], name: str, parts: Mapping[str, TensorEntry]) -> PackedLayer:
        """Shape and grid of one layer from its headers. ValueError, naming the layer, when they do not fit
        the settings.
        """

    @abstractmethod
    def unpack(self, config: Mapping[str, Any], layer: PackedLayer, tensors: Mapping[str, Tensor]) -> Codes:
        """One layer's integers and scales. ValueError (the caller adds the layer's name)."""

    def may_sort(self, config: Mapping[str, Any]) -> bool:
        """Whether the settings say that inputs were sorted before grouping."""
        return True

    def describe(self, config: Mapping[str, Any]) -> str:
        """For messages and the table of `quantize`."""
        return self.method


@dataclass(frozen=True)
class Incoming:
    """All packed layers of a checkpoint, by their name in its files."""

    reader: Reader
    config: Mapping[str, Any]
    layers: Mapping[str, PackedLayer]

    def __str__(self) -> str:
        return self.reader.describe(self.config)

    def weight(
        self, name: str, grid: IntGrid | None = None, device: torch.device | str = "cpu"
    ) -> PackedWeight:
        """The layer as it is in the files: the very codes, zero points and scales. grid: with another
        scale_dtype than the layer's own, which must then hold every scale exactly. ValueError naming the
        layer."""
        layer = self.layers[name]
        stored = SCALE_DTYPES[layer.parts[self.reader.scale].dtype]
        grid = grid or replace(layer.grid, scale_dtype=stored)
        if replace(grid, scale_dtype=layer.grid.scale_dtype) != layer.grid:
            raise ValueError(
                f"layer {name}: quant makes it {grid} with {grid.residual_bits} residual bits, the {self} "
                f"checkpoint has it as {layer.grid} "
                "with none; leave `quant` out of the recipe "
                "(from Python: lowbit_ft.recipe.incoming.resolve_quant)"
            )
        file = layer.parts[self.reader.parts[0]].file
        try:
            found = self.reader.unpack(
                self.config, layer, {local: read_tensor(entry) for local, entry in layer.parts.items()}
            )
            scale = exact_scales(found.scale, grid.scale_dtype)
            zero = checked_zeros(found.zero, grid)
        except ValueError as error:
            raise ValueError(f"{file}: layer {name}: {error}") from None
        codes = kernels.pack(found.codes, grid.bits)
        return PackedWeight(
            codes=codes.to(device),
            scale=scale.to(device),
            zero=None if zero is None else zero.to(device),
            shape=layer.shape,
            grid=grid,
        )

    def refuse_order(self) -> None:
        """ValueError naming the first layer whose inputs were sorted (act-order). Small reads; only where the
        settings announce it.
        """
        for layer in self.layers.values():
            entry = layer.parts.get(self.reader.order)
            if entry is not None and self.reader.may_sort(self.config):
                try:
                    refuse_order(read_tensor(entry), layer.grid.group_size)
                except ValueError as error:
                    raise ValueError(f"{entry.file}: layer {layer.name}: {error}") from None


def natural_scale_dtype(reader: Reader, layers: Mapping[str, PackedLayer]) -> dict[str, PackedLayer]:
    """The layers with the scale dtype they can keep: bfloat16 when the scales of the first layer are bfloat16
    values (whatever dtype they lie in), else the stored one. It is a guess for the rest, and `exact_scales`
    refuses where it is wrong."""
    first = next(iter(layers.values()))
    stored = read_tensor(first.parts[reader.scale]).float()
    if bool((stored.bfloat16().float() == stored).all()):
        return {
            name: replace(layer, grid=replace(layer.grid, scale_dtype="bfloat16"))
            for name, layer in layers.items()
        }
    return dict(layers)


def stored_scale_dtype(name: str, entry: TensorEntry) -> str:
    if entry.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{name}: scales of dtype {str(entry.dtype).removeprefix('torch.')}; allowed: "
            f"{', '.join(SCALE_DTYPES.values())}"
        )
    return SCALE_DTYPES[entry.dtype]


def exact_scales(scale: Tensor, dtype: str) -> Tensor:
    """scale [G, N] in `dtype`, every value unchanged. ValueError where that cannot be, or where training
    could not keep it.
    """
    value = scale.float()
    if not bool(torch.isfinite(value).all()):
        raise ValueError("scales have NaN or Inf; the file is damaged")
    low = int((value.abs() < SMALLEST_SCALE).sum())
    if low:
        raise ValueError(
            f"{low} of {value.numel()} scales are nearer to 0 than {SMALLEST_SCALE:.3g} (the nearest is "
            f"{float(value.abs().min()):.3g}), and training would have to change them: they come from groups "
            "without weights; quantize the full-precision checkpoint instead"
        )
    kept = scale.to(getattr(torch, dtype)).contiguous()
    changed = int((kept.float() != value).sum())
    if changed:
        raise ValueError(
            f"{changed} of {value.numel()} scales are not {dtype} values, and they are never rounded here; "
            f"set quant.scale_dtype: {SCALE_DTYPES[scale.dtype]}"
        )
    return kept


def checked_zeros(zero: Tensor | None, grid: IntGrid) -> Tensor | None:
    """uint8 [G, N], or None on a symmetric grid. ValueError when the file's zero points are not the
    grid's.
    """
    middle = grid.levels // 2
    if grid.symmetric:
        if zero is not None and bool((zero != middle).any()):
            raise ValueError(
                f"its settings say symmetric, but {int((zero != middle).sum())} of {zero.numel()} zero "
                f"points are not {middle}; "
                "they are wrong about this file: set sym (or symmetric) to false in "
                "quantization_config of config.json"
            )
        return None
    if zero is None:
        raise ValueError("its settings say asymmetric, but it has no zero points; the file is damaged")
    if bool(((zero < 0) | (zero >= grid.levels)).any()):
        raise ValueError(
            f"zero points run from {int(zero.min())} to {int(zero.max())}; allowed: 0 to {grid.levels - 1}"
        )
    return zero.to(torch.uint8).contiguous()


def expect(
    name: str, parts: Mapping[str, TensorEntry], local: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """ValueError when a tensor of the layer is missing or of another shape or dtype."""
    entry = parts.get(local)
    if entry is None:
        raise ValueError(f"{name}: no tensor {name}.{local} in the files")
    if entry.shape != shape or entry.dtype != dtype:
        raise ValueError(
            f"{entry.file}: {name}.{local} is {str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}; "
            f"quantization_config makes it {str(dtype).removeprefix('torch.')} {list(shape)}"
        )


def refuse_order(g_idx: Tensor, group_size: int) -> None:
    """ValueError when inputs were sorted before grouping (act-order): our groups are neighbours."""
    k = g_idx.shape[0]
    plain = torch.arange(k, device=g_idx.device) // (k if group_size == -1 else group_size)
    if not bool((g_idx < 0).all()) and not torch.equal(g_idx.long(), plain):
        raise ValueError(
            f"g_idx puts {int((g_idx != plain).sum())} of {k} inputs into groups of non-neighbours "
            "(desc_act / act-order), which no grid "
            "here has; use a checkpoint made with desc_act: false (actorder: null or static)"
        )


def integer_grid(what: str, **fields: Any) -> IntGrid:
    """IntGrid without residual; its ValueError with the place it came from."""
    try:
        return IntGrid(residual_bits=0, **fields)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
