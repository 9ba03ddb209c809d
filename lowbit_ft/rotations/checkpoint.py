"""FoldedCheckpoint: a checkpoint as it reads after a rotation. Every value is folded as it is read.

Whoever asks for a parameter, a matrix or the pieces of a file's tensor gets the folded one, one tensor at a
time, so packing, walking, merging and exporting stream as they do without a rotation, and all of them see the
same model. A head that is tied to the embedding becomes a tensor of its own: a norm's gain goes into one of
the two only. Nothing is written: the files stay what they are.

Folded tensors are made in float64 and come in float32, or in the dtype that is asked for. In a folder that is
written they have the model's dtype, which is the one that was trained with.

`online` puts the Hadamard of r4 before the linears that need it: in a PackedLinear into its slot, before a
dense linear as a hook.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..files.tensorfile import CheckpointError
from ..model.checkpoint import Checkpoint
from ..model.fused import Fusion
from ..model.linear import PackedLinear
from .folds import Fold, WeightFold
from .modulated import ModulatedStructure, structure_of
from .plan import Rotation
from .sites import Structure
from .turn import OnlineHadamard

PIECE = 1 << 24  # numbers of a table that are folded at a time while it is written


class FoldedCheckpoint(Checkpoint):
    """ValueError where the checkpoint cannot be turned so: it is packed already, its architecture is not
    known, a site has no Hadamard matrix."""

    def __init__(self, checkpoint: Checkpoint, rotation: Rotation):
        if checkpoint.incoming is not None:
            raise ValueError(
                f"quant.rotation: {checkpoint.source} is quantized already ({checkpoint.incoming}), and a "
                "rotation would round it anew; give the full-precision checkpoint, or set "
                "quant.rotation.kind: none and quant.smooth: null"
            )
        self.raw, self.rotation = copy.copy(checkpoint), rotation
        tied = _tied_head(checkpoint) if rotation.r1 else None
        if tied is not None:
            head, key = tied
            self.raw.entries = {**checkpoint.entries, head: checkpoint.entries[key]}
            self.raw.config = copy.deepcopy(checkpoint.config)
            self.raw.config.tie_word_embeddings = False
        self.raw._plan, self.raw._matrices = None, {}
        model = self.raw.empty_model("eager")
        self.__dict__.update({key: value for key, value in vars(self.raw).items()})
        self.untied = tied is not None
        self.structure: Structure | ModulatedStructure = structure_of(model, self.config)
        self.folds: dict[str, Fold] = self.structure.folds(rotation)
        self.online_layers = tuple(
            name
            for index, layer in enumerate(self.structure.layers)
            if rotation.r4 and rotation.r4[index]
            for name in layer.down
        )
        # file tensor -> the parameter that it is; of a tied pair one, they are folded alike
        self._users: dict[str, str] = {
            key: name for name in self.structure.parameters for key in self.raw.keys_for(name)
        }
        self._gains: dict[str, Tensor] = {}

    def empty_model(self, attention: str = "sdpa") -> Any:
        model = super().empty_model(attention)
        self.online(model)
        return model

    def online(self, model: nn.Module) -> None:
        for name in self.online_layers:
            layer = model.get_submodule(name)
            if isinstance(layer, PackedLinear):
                layer.input_transform = OnlineHadamard()
            elif not any(isinstance(hook, _Before) for hook in layer._forward_pre_hooks.values()):
                layer.register_forward_pre_hook(_Before())

    def gain(self, norm: str) -> Tensor:
        """What a norm multiplies with, float64 [H], before anything is folded."""
        if norm not in self._gains:
            name = self.structure.weight(norm)
            assert name is not None, norm
            value = self.raw.weight_for(name, dtype=torch.float32).double()
            self._gains[norm] = value + 1 if self.structure.family.one_plus else value
        return self._gains[norm]

    def weight_for(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        fold = self.folds.get(name)
        if fold is None:
            return self.raw.weight_for(name, device=device, dtype=dtype, rows=rows)
        value = self.raw.weight_for(name, device=device, dtype=torch.float32, rows=rows)
        return fold.parameter(value, self.gain).to(dtype or self.dtype)

    def matrix(
        self,
        layer: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        fold, matrix = self.fold_of(layer), self.matrices[layer]
        if fold is None:
            return self.raw.matrix(layer, device=device, dtype=dtype, rows=rows)
        if fold.whole and matrix.rows is not None:  # outputs are turned in the whole
            return matrix.rows.of(self.matrix(matrix.whole, device=device, dtype=dtype))
        value = self.raw.matrix(layer, device=device, dtype=torch.float32, rows=rows)
        return fold.matrix(value, self.gain).to(dtype or self.dtype)

    def take_apart(self, fusions: Mapping[str, Fusion]) -> None:
        super().take_apart(fusions)
        self.raw.take_apart(fusions)

    def fold_of(self, layer: str) -> WeightFold | None:
        """What becomes of the matrix of a linear."""
        fold = self.folds.get(self.matrices[layer].parameter)
        assert fold is None or isinstance(fold, WeightFold)
        return fold

    def stored_matrix_dtype(self, layer: str) -> torch.dtype:
        return self.raw.stored_matrix_dtype(layer) if self.fold_of(layer) is None else torch.float32

    def row_blocks(self, layer: str, limit: int | None) -> list[tuple[int, int] | None]:
        """One whose outputs are turned is read whole: each of its rows is made of all."""
        fold = self.fold_of(layer)
        return [None] if fold is not None and fold.whole else self.raw.row_blocks(layer, limit)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.raw.shape(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        if self._fold_in_file(name) is None:
            return self.raw.stored_dtype(name)
        parameter = self._users[name]
        if parameter in self.converted():
            raise ValueError(
                f"quant.rotation: {parameter} is made of several tensors of the files, which stay dense and "
                "would have to be rotated there; pack it too (quant.targets and quant.exclude), or set "
                "quant.rotation.sites.r1: false"
            )
        return self.dtype

    def read(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        row: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The tensor of that name in the files, folded: in the model's dtype where dtype is None."""
        if self._fold_in_file(name) is None:
            return self.raw.read(name, device=device, dtype=dtype, row=row, rows=rows)
        assert row is None, f"{name}: a stack that is folded is read through its matrices"
        dtype = dtype or self.stored_dtype(name)
        return self.weight_for(self._users[name], device=device, dtype=dtype, rows=rows)

    def stored_pieces(self, name: str) -> Iterator[Tensor]:
        if self._fold_in_file(name) is None:
            return self.raw.stored_pieces(name)
        return self._pieces(self._users[name], self.stored_dtype(name))

    def _pieces(self, parameter: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Of a table (embedding, head) some rows at a time."""
        fold, shape = self.folds[parameter], self.structure.parameters[parameter]
        by_rows = isinstance(fold, WeightFold) and not fold.whole and not fold.turned and len(shape) == 2
        step = max(1, PIECE // shape[-1]) if by_rows else shape[0]
        for first in range(0, shape[0], step):
            rows = (first, min(first + step, shape[0])) if step < shape[0] else None
            yield self.weight_for(parameter, dtype=dtype, rows=rows).view(-1)

    def _fold_in_file(self, key: str) -> Fold | None:
        return self.folds.get(self._users.get(key, ""))

    def turn_lora(self, layer: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] of a LoRA that was trained on the model as it is in the files, for this one:
        (R_out^T B) (A diag(g) R_in) is the fold of B A."""
        fold = self.fold_of(layer)
        if fold is None:
            return a, b
        return fold.inputs(a, self.gain), fold.outputs(b.t()).t().contiguous()


class _Before:
    """A forward pre-hook: what a dense linear is given, transformed."""

    def __init__(self) -> None:
        self.transform = OnlineHadamard()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.transform(args[0]), *args[1:])


def _tied_head(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(head's weight, the file tensor of the embedding that it is tied to); None where it is its own."""
    model = checkpoint.empty_model("eager")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    keys = checkpoint.keys_for(f"{names[id(embedding)]}.weight")
    if len(keys) != 1:
        raise CheckpointError(f"{checkpoint.folder}: the embedding is made of {len(keys)} tensors")
    return f"{names[id(head)]}.weight", keys[0]
