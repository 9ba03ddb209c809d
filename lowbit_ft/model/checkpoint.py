"""A Hugging Face checkpoint: the parameters of its model, and where in the files each one's value is.

`Checkpoint` is tensors.py's directory with config.json and the names of the model beside it. Key names go
through transformers' own conversion table (names.py: renames, the base-model prefix, per-expert weights fused
into one 3-D parameter), so what loads here is what `from_pretrained` loads. Values come one parameter at a
time (`weight_for`), or as the matrix [N, K] of one linear however the files and the model keep it (`matrix`),
or, of a checkpoint that is quantized already, as the integers that are there (`packed_weight`).

`empty_model` builds the model without weights (meta.py); load.py fills it.
"""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.tensorfile import CheckpointError
from ..grid import IntGrid, PackedWeight
from .chat_template import Template
from .config import CONFIG, check_counts, load_config, read_config
from .conv import matrix_of
from .fused import Fusion, check_parts
from .hub import locate
from .matrices import Matrix, find_matrices
from .meta import meta_model
from .names import Part, Source, expert_keys, file_parts, weight_sources
from .purpose import (
    Purpose,
    drawn,
    for_other_labels,
    of_another_head,
    refuse_other_body,
    refuse_other_labels,
)
from .tensors import TensorFiles


class Checkpoint(TensorFiles):
    """A Hugging Face checkpoint folder, its configuration and its tensor directory; holds no weights.

    Make one with `Checkpoint.open`. Attributes: source (as given), folder (resolved Path), revision (the
    commit, for a hub id, else None), config (transformers configuration), dtype (torch dtype that weights
    are read in by default). untied: whether its head, tied in the files, is a tensor of its own from here on;
    online_layers: linears that need a transform before them (rotations/checkpoint.py folds values and has
    such). chat_template: what its tokenizer writes chats with, here and where it ships; None: its own.
    purpose: what its model is built for (None: to write text); drawn: parameters of its head that the files
    have not, by name; relabelled: those that they have for other labels.
    """

    untied: bool = False
    chat_template: Template | None = None
    online_layers: tuple[str, ...] = ()
    drawn: Mapping[str, Tensor] = {}
    relabelled: tuple[str, ...] = ()

    def __init__(
        self,
        source: str,
        folder: Path,
        revision: str | None,
        config: Any,
        dtype: torch.dtype,
        purpose: Purpose | None = None,
    ) -> None:
        super().__init__(folder, getattr(config, "quantization_config", None))
        try:
            check_counts(folder / CONFIG, read_config(folder), self.entries)
        except ValueError as error:
            self._problems.append(str(error))
        if self.incoming is not None:
            # From here on its layers are ours: no model of it may look for the packages of that format.
            del config.quantization_config
        self.source, self.revision, self.purpose = source, revision, purpose
        self.config, self.dtype = config if purpose is None else purpose.applied(config, folder), dtype
        self._plan: dict[str, Source] | None = None
        self._matrices: dict[str, Matrix] = {}
        self._fusions: dict[str, Fusion] = {}
        self._experts: Counter[str] = Counter()  # 3-D parameter -> its number of experts

    @classmethod
    def open(
        cls,
        source: str | Path,
        revision: str | None = None,
        dtype: str | torch.dtype = "bfloat16",
        check: bool = True,
        purpose: Purpose | None = None,
    ) -> Checkpoint:
        """Open a local folder or a hub id (its JSON, tokenizer and safetensors are fetched at `revision`).
        purpose: what its model is built for; None: to write text.

        Reads config.json and the safetensors headers. Raises CheckpointError; with check=False problems of
        the weight files are kept for `check()`.
        """
        folder, commit = locate(str(source), revision)
        config = load_config(folder)
        resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        checkpoint = cls(str(source), folder, commit, config, resolved, purpose)
        if check:
            checkpoint.check()
        return checkpoint

    def empty_model(self, attention: str = "sdpa") -> Any:
        """The model of its purpose, in eval mode: parameters on meta (tied ones are one object), real
        buffers.
        """
        model = meta_model(self.config, self.dtype, attention, self.folder / "config.json", self.purpose)
        model.config._name_or_path = self.source
        if self._plan is None:
            self.check()
            self._plan = self._planned(model)
            self._matrices = find_matrices(model)
            self.take_apart(self._fusions)
            self._experts = Counter(matrix.parameter for matrix in self._matrices.values())
        return model.eval()

    def _planned(self, model: Any) -> dict[str, Source]:
        """Where the value of each parameter is. For a purpose, tensors of another head are left out from here
        on, and what the files have not of this one is drawn."""
        if self.purpose is None:
            return weight_sources(model, self.entries, self.folder)
        left = partial(of_another_head, model)
        plan = weight_sources(model, self.entries, self.folder, left)
        used = {key for source in plan.values() for key, _ in source.keys}
        self.entries = {key: e for key, e in self.entries.items() if key in used or not left(key)}
        if self.purpose.relabels and (other := for_other_labels(model, plan, self.entries)):
            self.relabelled = tuple(other)
            gone = set(other.values())
            self.entries = {key: entry for key, entry in self.entries.items() if key not in gone}
            plan = weight_sources(model, self.entries, self.folder, left)
        refuse_other_body(model, plan, self.config, self.folder)
        refuse_other_labels(model, plan, self.entries, self.folder)
        self.drawn = drawn(model, plan.keys(), self.purpose, self.dtype)
        if not self.drawn:
            return plan
        self.give(self.drawn)
        return weight_sources(model, self.entries, self.folder)

    def online(self, model: Any) -> None:
        """Put the transforms of `online_layers` before the linears of a model, packed or not."""
        assert not self.online_layers

    def refuse_strangers(self) -> None:
        """Raise CheckpointError for tensors of the files that the model does not take (names.py), and for a
        model that cannot be built."""
        self._sources()

    def keys_for(self, name: str) -> list[str]:
        """The file tensors that the model's parameter or buffer `name` is made of; more than one, or one that
        is changed on the way, when transformers converts it. Empty when the files have none."""
        source = self._sources().get(name)
        return [] if source is None else [key for key, _ in source.keys]

    def converted(self) -> list[str]:
        """Model parameters that are not a file tensor as it is (fused experts and such)."""
        return sorted(name for name, source in self._sources().items() if source.converter is not None)

    def has_weight_for(self, name: str) -> bool:
        """Whether the files have a value for the model's parameter or buffer `name`."""
        return name in self._sources()

    def origin(self, name: str) -> str:
        """Where the value of the model parameter `name` comes from, for messages: "file: tensor"."""
        key = self._sources()[name].keys[0][0]
        return f"{self.file(key)}: tensor {key!r}"

    def weight_for(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The value of the model parameter (or buffer) `name`: through renames, ties and fused experts. rows:
        of one that `row_blocks` cuts.

        dtype None means the checkpoint's `dtype`, for floating tensors. Raises CheckpointError if no file has
        it.
        """
        source = self._sources().get(name)
        if source is None:
            near = difflib.get_close_matches(name, self.entries, n=3, cutoff=0.5)
            raise CheckpointError(
                f"{self.folder}: no tensor for the model's parameter {name!r} in its safetensors files"
                + (f"; nearest names there: {', '.join(near)}" if near else "")
                + ". The files and config.json do not belong together."
            )
        if source.converter is None:
            return self.read(source.keys[0][0], device=device, dtype=dtype or self.dtype, rows=rows)
        assert rows is None, f"{name}: made of several tensors, read whole"
        tensors = [self.read(key, device=device, dtype=dtype or self.dtype) for key, _ in source.keys]
        converter = copy.deepcopy(source.converter)  # it collects tensors in itself
        for (key, pattern), tensor in zip(source.keys, tensors, strict=True):
            converter.add_tensor(source.first, key, pattern, tensor)
        del tensors
        value = converter.convert(source.first, config=self.config)[name]
        return value[0] if isinstance(value, list) else value

    def packed_key(self, name: str) -> str | None:
        """The packed layer of the files (its name there) that the model's parameter `name` is, when it is one
        and nothing else.
        """
        keys = self.keys_for(name)
        source = self._sources().get(name)
        if self.incoming is None or source is None or source.converter is not None or len(keys) != 1:
            return None
        key = keys[0].removesuffix(".weight")
        return key if key in self.incoming.layers else None

    def packed_weight(self, name: str, grid: IntGrid, device: str | torch.device = "cpu") -> PackedWeight:
        """The packed layer whose weight is the model's parameter `name`, on its grid, as it is in the files
        (incoming/).
        """
        key = self.packed_key(name)
        assert self.incoming is not None and key is not None, name
        return self.incoming.weight(key, grid, device)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Every matrix of the model that can be packed, by the name of its linear; and the parts of those
        that were taken apart."""
        self._sources()
        return self._matrices

    def take_apart(self, fusions: Mapping[str, Fusion]) -> None:
        """From here on know the parts of these matrices too. ValueError for parts that are none of this
        model."""
        self._fusions |= fusions
        if self._plan is None:
            return  # empty_model will
        for name, fusion in fusions.items():
            matrix = self._matrices.get(name)
            if matrix is None or matrix.expert is not None or matrix.embedding or matrix.conv:
                raise ValueError(f"{name}: the checkpoint's model has no such linear to be taken apart")
            check_parts(fusion.values(), matrix.shape[0], name)
            self._matrices |= matrix.parts(fusion)

    def stored_matrix_dtype(self, layer: str) -> torch.dtype:
        """The dtype in which `matrix` can be read as it is in the files: theirs, or a wider one for bytes and
        for doubles fp32.
        """
        dtypes = {self.stored_dtype(key) for key in self.keys_for(self.matrices[layer].parameter)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return torch.bfloat16 if dtype.itemsize == 1 else torch.float32 if dtype.itemsize > 4 else dtype

    def row_blocks(self, layer: str, limit: int | None) -> list[tuple[int, int] | None]:
        """(first, last) rows of the matrix of a linear (of the whole one, where it is a part) that `matrix`
        can read by themselves, each of about `limit` bytes in the files; [None], all at once, where it is
        small, kept in another way than as one tensor, or limit is None."""
        matrix = self.matrices[layer]
        source = self._sources().get(matrix.parameter)
        n, part = matrix.shape[0], matrix.rows
        begin = 0 if part is None else part.start
        if (
            limit is None
            or matrix.expert is not None
            or matrix.transposed
            or matrix.conv
            or (part is not None and part.count > 1)
            or source is None
            or source.converter is not None
            or self.packed_key(matrix.parameter)
        ):
            return [None]
        nbytes = self.entry(source.keys[0][0]).nbytes * n // self.matrices[matrix.whole].shape[0]
        count = min(n, -(-nbytes // limit))
        step = -(-n // count)
        if count <= 1 and part is None:
            return [None]
        return [(begin + first, begin + min(first + step, n)) for first in range(0, n, step)]

    def matrix(
        self,
        layer: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The matrix [N, K] of a linear, however the files and the model keep it (turned, one expert of a
        stack). Of a stack of experts only the one that is asked for is read. rows: only these, one of
        `row_blocks`."""
        matrix = self.matrices[layer]
        if rows is not None:
            return self.weight_for(matrix.parameter, device=device, dtype=dtype, rows=rows)
        if matrix.expert is None:
            value = self.weight_for(matrix.parameter, device=device, dtype=dtype)
        else:
            value = self._expert(matrix, device, dtype or self.dtype)
        value = value.t().contiguous() if matrix.transposed else value
        value = matrix_of(value) if matrix.conv else value
        value = value if matrix.rows is None else matrix.rows.of(value)
        if value.shape != matrix.shape:
            raise CheckpointError(
                f"{self.origin(matrix.parameter)} makes a matrix {list(value.shape)}, but config.json "
                f"makes the model's {layer!r} "
                f"{list(matrix.shape)}. The files and config.json do not belong together."
            )
        return value

    def parts(self, layer: str) -> list[Part] | None:
        """The file tensors that, one below the other, are the matrix [N, K] of a linear; None when the files
        keep it in another way.
        """
        matrix = self.matrices[layer]
        source = self._sources().get(matrix.parameter)
        return None if source is None else file_parts(matrix, source, self.entries)

    def _expert(self, matrix: Matrix, device: str | torch.device, dtype: torch.dtype) -> Tensor:
        source, expert = self._sources().get(matrix.parameter), matrix.expert
        assert expert is not None
        count = self._experts[matrix.parameter]
        keys = expert_keys(source, expert, count) if source is not None else None
        if source is None or source.converter is not None and keys is None:
            stack = self.weight_for(matrix.parameter, device=device, dtype=dtype)
            self._same_count(matrix, stack.shape[0], count)
            return stack[expert].clone()
        if source.converter is None:
            key = source.keys[0][0]
            self._same_count(matrix, self.shape(key)[0], count)
            return self.read(key, device=device, dtype=dtype, row=expert)
        converter = copy.deepcopy(source.converter)
        for key, pattern in keys or []:
            tensor = self.read(key, device=device, dtype=dtype)
            converter.add_tensor(source.first, key, pattern, tensor)
        value = converter.convert(source.first, config=self.config)[matrix.parameter]
        value = value[0] if isinstance(value, list) else value
        self._same_count(matrix, value.shape[0], 1)
        return value[0]

    def _same_count(self, matrix: Matrix, found: int, wanted: int) -> None:
        if found != wanted:
            raise CheckpointError(
                f"{self.folder}: the files have {found} experts for {matrix.parameter!r}, "
                f"config.json says {wanted}. "
                "The files and config.json do not belong together."
            )

    def _sources(self) -> dict[str, Source]:
        if self._plan is None:
            self.empty_model("eager")
        assert self._plan is not None
        return self._plan
