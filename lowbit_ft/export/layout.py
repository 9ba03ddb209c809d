"""Where every tensor of a model will lie in the files of a format, known before anything is written.

Packed layers take the names and shapes their exporter gives; everything else keeps its name and dtype. What
the format cannot hold is refused here, while nothing has been trained yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..model.checkpoint import Checkpoint
from ..model.config import read_config
from ..model.matrices import Matrix, fusions_of
from ..model.names import Part
from .base import Exporter, LayerSpec


@dataclass(frozen=True)
class Slot:
    """One tensor of the output: its key in the file, and where it comes from (a layer's local name, or a
    checkpoint tensor).
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str | None
    source: str
    part: Part | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Layout:
    """Which tensors the output has, under which names, and what config.json says about them."""

    def __init__(self, checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter):
        self.checkpoint, self.layers, self.exporter = checkpoint, layers, exporter
        self.untied = False
        self.matrices = self._matrices()
        self.packed = {
            matrix.parameter for matrix in self.matrices.values()
        }  # the dense parameters that are no more
        self.experts = any(matrix.expert is not None for matrix in self.matrices.values())
        model = checkpoint.empty_model("eager")
        self.users: dict[str, dict[str, None]] = {}  # checkpoint tensor -> the model's parameters it feeds
        for name in model.state_dict():
            for key in checkpoint.keys_for(name):
                self.users.setdefault(key, {})[name] = None
        # checkpoint tensor -> the parameter it is in the new folder: of a tied pair, the one that stays
        self.parameters = {
            key: next((n for n in names if n not in self.packed), None) for key, names in self.users.items()
        }
        self._refuse(model)
        self.skipped = _dense_layers(model, self.packed)
        if exporter.checkpoint_names:  # readers that know the checkpoint call them as it does
            renamed = [
                keys[0].removesuffix(".weight")
                for n in self.skipped
                if len(keys := checkpoint.keys_for(f"{n}.weight")) == 1
            ]
            self.skipped += [name for name in renamed if name not in self.skipped]
        self.parts = {name: self._parts_of(name) for name in layers}
        self.prefixes = {name: "+".join(part.key for part in parts) for name, parts in self.parts.items()}
        self.slots = [slot for name in layers for slot in self._packed_slots(name)] + self._dense_slots()
        keys = [slot.key for slot in self.slots]
        assert len(keys) == len(set(keys)), "two tensors of one name"

    def _matrices(self) -> dict[str, Matrix]:
        """What every layer is in the dense model."""
        apart = fusions_of(Matrix(name, "", spec.shape, rows=spec.rows) for name, spec in self.layers.items())
        self.checkpoint.take_apart(apart)
        known = self.checkpoint.matrices
        for name, spec in self.layers.items():
            if name not in known or not self.checkpoint.keys_for(known[name].parameter):
                raise ValueError(f"{name}: the checkpoint's model has no such layer")
            if known[name].shape != spec.shape:
                raise ValueError(
                    f"{name}: the packed weight is {list(spec.shape)}, the checkpoint's model has "
                    f"{known[name].shape}"
                )
        return {name: known[name] for name in self.layers}

    def _refuse(self, model: nn.Module) -> None:
        """ValueError for what the format cannot hold beyond grids: kinds of layers, and layers together."""
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHED

        checkpoint, exporter = self.checkpoint, self.exporter
        dense = sorted(set(checkpoint.converted()) - self.packed)
        # Modules that transformers builds another way when it reads a quantized folder, and then finds no
        # tensors for (Llama 4).
        dense += [name for name, module in model.named_modules() if type(module).__name__ in PATCHED]
        if dense and not exporter.dense_experts:
            raise ValueError(
                f"{exporter.name} cannot hold this model: transformers does not read dense experts "
                f"({dense[0]}, ...) "
                "beside packed layers of that format; set export.format: native"
            )
        refused: dict[str, list[str]] = {}  # reason -> layers
        for name, matrix in self.matrices.items():
            parts, keys = checkpoint.parts(name), checkpoint.keys_for(matrix.parameter)
            if reason := exporter.reject_matrix(matrix, self.layers[name].grid, parts):
                refused.setdefault(reason, []).append(name)
            elif (
                matrix.plain
                and parts is None
                and (exporter.checkpoint_names or not self.users[keys[0]].keys() <= self.packed)
            ):
                raise ValueError(
                    f"{name}: its weight is not one tensor of the checkpoint ({len(keys)} make it), so it "
                    "cannot be exchanged "
                    f"for a packed one; leave it dense: quant.exclude: [{name}]"
                )
        if self.experts and (reason := exporter.reject_experts(self.layers)):
            refused[reason] = ["these layers together"]
        if refused:
            lines = [
                f"{', '.join(names[:4])}{f' and {len(names) - 4} more' * (len(names) > 4)}: {why}"
                for why, names in refused.items()
            ]
            raise ValueError(f"{exporter.name} cannot hold this model:\n  " + "\n  ".join(lines))

    def _parts_of(self, name: str) -> list[Part]:
        """Names of the layer in the files, and the rows of its matrix under each."""
        parts, users = (
            self.checkpoint.parts(name),
            self.users[self.checkpoint.keys_for(self.matrices[name].parameter)[0]],
        )
        tied = self.matrices[name].expert is None and len(users) > 1
        self.untied |= tied  # one of the two is packed, or each on its own: from here on they are two
        if parts is None or tied or not self.exporter.checkpoint_names:
            return [Part(name, 0, self.layers[name].shape[0])]
        return [Part(key.removesuffix(".weight"), *rows) for key, *rows in parts]

    def _packed_slots(self, name: str) -> list[Slot]:
        spec, expert, trained = (
            self.layers[name],
            self.matrices[name].expert is not None,
            self.checkpoint.dtype,
        )
        slots = []
        for part in self.parts[name]:
            own = replace(spec, shape=(part.last - part.first, spec.shape[1]))
            for local, (shape, dtype) in self.exporter.specs(own).items():
                dtype = self.exporter.stored_dtype(local, dtype, expert, trained)
                slots.append(Slot(f"{part.key}.{local}", shape, dtype, name, local, part))
        return slots

    def _dense_slots(self) -> list[Slot]:
        """Everything that is not packed, copied. Of a tied pair of which one is packed, the rest goes by the
        name of the other.
        """
        checkpoint, slots = self.checkpoint, []
        for key in checkpoint.names():
            users = self.users.get(key, {}).keys()
            left = users - self.packed
            if users and not left:
                continue
            name = next(iter(left)) if len(users) > len(left) == 1 else key
            slots.append(Slot(name, checkpoint.shape(key), checkpoint.stored_dtype(key), None, key))
        return slots

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The checkpoint's config.json, with our quantization_config and the dtype of training."""
        config = read_config(checkpoint.folder)  # without keys that name code, kernels or other files
        # Readers on transformers 4 know the older key only; whichever the checkpoint used is kept.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(checkpoint.dtype).removeprefix(
            "torch."
        )
        if checkpoint.purpose is not None:
            config |= checkpoint.purpose.entries(checkpoint.config)
        if self.untied or checkpoint.untied:
            config["tie_word_embeddings"] = False
        entry = self.exporter.model_config(self.layers, self.skipped)
        entry = self.exporter.reader_config(entry, checkpoint.config.model_type, self.experts)
        if checkpoint.online_layers:
            entry["hadamard"] = list(checkpoint.online_layers)
        config[self.exporter.config_key] = entry
        config["quantization_config"] = {"quant_method": self.exporter.quant_method} | entry
        return config | self.exporter.folder_config()


def _dense_layers(model: nn.Module, packed: set[str]) -> list[str]:
    """Modules with a matrix that stays dense: what a reader must not expect to be packed. Stacks of experts,
    whose members other readers see as layers of their own, are named by a pattern too."""
    skipped = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        ranks = {
            p.dim()
            for key, p in module.named_parameters(recurse=False)
            if f"{name}.{key}" not in packed and not key.endswith("bias")
        }
        if ranks & {2, 3}:
            skipped.append(name)
        if 3 in ranks:
            escaped = name.replace(".", r"\.")
            skipped.append(rf"re:{escaped}\..*")
    return skipped
