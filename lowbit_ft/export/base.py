"""What an exporter is: two inverse pure functions on one layer, a predicate that refuses with a way out, and a config entry.

    pack(weight) -> {local name: tensor}        unpack(tensors, layer) -> weight        unpack(pack(w), spec) == w, bit for bit

`LayerSpec` is what is known of a layer before its tensors exist, and `Weights` is many layers of which one at a time is in
memory: the writer computes every offset of every file from the specs, then asks for the weights one by one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..grid import Grid, PackedWeight, Weight

TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype)


@dataclass(frozen=True)
class LayerSpec:
    """Shape (N, K) of a layer, its grid, and whether it carries a float offset per group."""

    shape: tuple[int, int]
    grid: Grid
    offset: bool = False

    @classmethod
    def of(cls, weight: Weight) -> "LayerSpec":
        return cls(weight.shape, weight.grid, isinstance(weight, PackedWeight) and weight.offset is not None)

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    def __str__(self) -> str:
        return f"{self.grid}{' with a float offset' if self.offset else ''}"


class Weights(Mapping[str, Weight]):
    """Layer name -> Weight, made anew on every access: `.items()` holds one layer at a time. `.specs` costs nothing.

    A layer whose weight does not match its spec is our own mistake (AssertionError).
    """

    def __init__(self, specs: Mapping[str, LayerSpec], make: Callable[[str], Weight]):
        self.specs = dict(specs)
        self._make = make

    @classmethod
    def of(cls, weights: Mapping[str, Weight]) -> "Weights":
        """Weights that are in memory already."""
        if isinstance(weights, Weights):
            return weights
        return cls({name: LayerSpec.of(weight) for name, weight in weights.items()}, weights.__getitem__)

    def __getitem__(self, name: str) -> Weight:
        spec = self.specs[name]
        weight = self._make(name)
        assert LayerSpec.of(weight) == spec, f"{name}: announced as {spec}, made {LayerSpec.of(weight)}"
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs


@dataclass(frozen=True)
class ReadBack:
    """What the format's own reader finds in a file: codes uint8 [N, K] (planes [q, N, K]), scale and zero as in the weight."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None


class Exporter(ABC):
    """One file format. Stateless: the members of EXPORTERS are instances without fields."""

    name: ClassVar[str]
    quant_method: ClassVar[str]  # of config.json, by which a folder is recognised
    # Whether packed tensors are named as the checkpoint names its layers (for readers that know the checkpoint) or as the model
    # does. The two differ only for checkpoints that were saved without the model's prefix or under older names.
    checkpoint_names: ClassVar[bool] = False
    # Whether its readers take dense tensors that transformers fuses while loading (the experts of a mixture) beside packed layers.
    dense_experts: ClassVar[bool] = True

    @abstractmethod
    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        """Why this format cannot hold the grid (offset: with a float offset per group), with the way out; None when it can."""

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        """Why this format cannot hold the grid on a layer of so many inputs, with the way out; None when it can."""
        return None

    def reject_dtype(self, grid: Grid, dtype: str) -> str | None:
        """Why this format's readers would change the scales of the grid in a model of that dtype ("bfloat16", ...), with the way
        out; None when they do not."""
        return None

    def reject_model(self, layers: Mapping[str, LayerSpec]) -> list[str]:
        """Every reason why this format cannot hold these layers together, each naming a layer; empty when it can."""
        problems = []
        for name, spec in layers.items():
            reason = self.reject(spec.grid, spec.offset) or self.reject_width(spec.grid, spec.shape[1])
            if reason:
                problems.append(f"{name}: {reason}")
        return problems

    @abstractmethod
    def specs(self, layer: LayerSpec) -> TensorSpecs:
        """Shape and dtype of every tensor that `pack` makes of such a layer."""

    @abstractmethod
    def pack(self, weight: Weight) -> dict[str, Tensor]:
        """The tensors of one layer under their local names (what follows "<layer>." in the file)."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        """The inverse of `pack`. ValueError when the tensors do not fit the spec."""

    @abstractmethod
    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. skipped: names of the layers that stay dense."""

    @abstractmethod
    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """One layer's tensors through the code of the format's own library, not ours (verify compares it with the weight)."""

    def load_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that from_pretrained needs for a folder with this quantization_config."""
        return {}

    @abstractmethod
    def serve(self, folder: str) -> str:
        """A command line that runs a folder of this format."""


def check_tensors(tensors: Mapping[str, Tensor], wanted: TensorSpecs, what: str) -> None:
    """ValueError listing what is missing, unknown, or of the wrong shape or dtype."""
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in wanted]
    for name, (shape, dtype) in wanted.items():
        if name in tensors and (tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype):
            got = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
            problems.append(f"{name} is {got}, not {dtype} {shape}")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))


def check_values(weight: Weight) -> None:
    """ValueError for values that no writer of ours makes: scales that are not finite, zero points beyond the codes."""
    if not bool(torch.isfinite(weight.scale.float()).all()):
        raise ValueError("scale has NaN or Inf; the file is damaged")
    if isinstance(weight, PackedWeight):
        if weight.offset is not None and not bool(torch.isfinite(weight.offset.float()).all()):
            raise ValueError("offset has NaN or Inf; the file is damaged")
        if weight.zero is not None and weight.zero.numel() and int(weight.zero.max()) >= weight.grid.levels:
            raise ValueError(
                f"zero is {int(weight.zero.max())} on a grid of {weight.grid.levels} codes; the file is damaged"
            )
