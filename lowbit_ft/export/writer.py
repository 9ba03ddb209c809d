"""write_model: a complete Hugging Face folder from a checkpoint and packed layers, with one tensor in memory at a time.

Every shape and dtype is known from the specs, so the headers of all shards are written first and each tensor goes straight to
its final place in its file. Packed layers come from `weights`; everything else is copied from the checkpoint in the dtype it is
stored in. config.json's dtype becomes the one the model was trained in, because that is the dtype in which what ships is what
was trained.

The folder is there whole or not at all, and takes the place of another only when we wrote all of that one (folder.py).
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import file_entry, staged_folder
from ..grid import Weight
from ..load import Checkpoint
from ..load_names import Part
from ..matrices import Matrix
from ..tensorfile import DTYPES
from .base import Exporter, LayerSpec, Weights
from .folder import (
    MANIFEST,
    check_extra,
    check_files,
    check_space,
    check_target,
    copied_files,
    disk_errors,
    layer_digests,
    read_manifest,
    replace_file,
    tensor_bytes,
    write_json,
)
from .gguf_file import GgufFile
from .planes import as_integers, held

__all__ = ["CONTAINERS", "MAX_SHARD_BYTES", "check_files", "layer_digests", "read_manifest", "replace_file", "write_model"]

MAX_SHARD_BYTES = (
    5_000_000_000  # as transformers' own save_pretrained (5GB of its docs; file systems and the hub like it)
)

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Slot:
    """One tensor of the output: its key in the file, and where it comes from (a layer's local name, or a checkpoint tensor)."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str | None
    source: str
    part: Part | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_model(
    folder: str | Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, Weight],
    exporter: Exporter,
    *,
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write `folder` and return its manifest (the content of lowbit_ft.json).

    weights: layer name in the model -> weight; a `Weights` is read one layer at a time. extra_files: name -> content of further
    files (README.md, recipe.yaml). Raises ValueError before anything is written when the format cannot hold a layer, a layer is
    not one of the checkpoint's, the disk is too small, or the folder exists and is not wholly ours.
    """
    folder, stream = Path(folder), as_integers(Weights.of(weights), exporter)
    check_target(folder)
    extra = check_extra(extra_files or {})
    layout = check_model(checkpoint, stream.specs, exporter)
    files = CONTAINERS[exporter.container](layout, checkpoint, exporter, max_shard_bytes)
    copied = copied_files(checkpoint.folder)
    if clash := sorted({path.name for path in copied} & set(extra)):
        raise ValueError(f"extra file {clash[0]!r}: the checkpoint has a file of this name, which is part of the model")
    size = files.nbytes + sum(len(c) for c in extra.values())
    size += sum(path.stat().st_size for path in copied) + (1 << 20)
    check_space(folder, size)

    with disk_errors(folder), staged_folder(folder) as stage:
        digests = files.write(stage, stream)
        write_json(stage / "config.json", layout.config(checkpoint))
        for path in copied:
            shutil.copyfile(path, stage / path.name)
        for name, content in extra.items():
            (stage / name).write_bytes(content)
        manifest = {
            "writer": "lowbit_ft",
            "version": 1,
            "format": exporter.name,
            "source": {"path": checkpoint.source, "revision": checkpoint.revision},
            "files": {path.name: file_entry(path) for path in sorted(stage.iterdir())},
            "layers": {
                name: {"grid": str(spec), "stored_as": layout.prefixes[name], "sha256": digests[name]}
                for name, spec in stream.specs.items()
            },
        }
        write_json(stage / MANIFEST, manifest)
    return manifest


def check_model(checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter) -> "_Layout":
    """Where everything will lie in the files. ValueError when the format cannot hold these layers of this checkpoint: worth asking
    before they are trained."""
    if not layers:
        raise ValueError(f"{checkpoint.source}: there is no packed layer to write")
    layers = {name: replace(spec, grid=held(exporter, spec.grid)) for name, spec in layers.items()}
    if reason := exporter.missing(exporter.writes_with):
        raise ValueError(f"{exporter.name} {reason}")
    problems = exporter.reject_model(layers) + exporter.reject_checkpoint(checkpoint.config.to_dict(), checkpoint.folder)
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    by_dtype = {spec.grid: name for name, spec in layers.items()}
    problems += [f"{name}: {reason}" for grid, name in by_dtype.items() if (reason := exporter.reject_dtype(grid, dtype))]
    if problems:
        raise ValueError(f"{exporter.name} cannot hold this model:\n  " + "\n  ".join(problems))
    return _Layout(checkpoint, layers, exporter)


class _Layout:
    """Which tensors the output has, under which names, and what config.json says about them."""

    def __init__(self, checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter):
        self.checkpoint, self.layers, self.exporter = checkpoint, layers, exporter
        self.untied = False
        self.matrices = self._matrices()
        self.packed = {matrix.parameter for matrix in self.matrices.values()}  # the dense parameters that are no more
        self.experts = any(matrix.expert is not None for matrix in self.matrices.values())
        model = checkpoint.empty_model("eager")
        self.users: dict[str, dict[str, None]] = {}  # checkpoint tensor -> the model's parameters it feeds
        for name in model.state_dict():
            for key in checkpoint.keys_for(name):
                self.users.setdefault(key, {})[name] = None
        # checkpoint tensor -> the parameter it is in the new folder: of a tied pair, the one that stays
        self.parameters = {key: next((n for n in names if n not in self.packed), None) for key, names in self.users.items()}
        self._refuse(model)
        self.skipped = _dense_layers(model, self.packed)
        if exporter.checkpoint_names:  # readers that know the checkpoint call them as it does
            renamed = [keys[0].removesuffix(".weight") for n in self.skipped if len(keys := checkpoint.keys_for(f"{n}.weight")) == 1]
            self.skipped += [name for name in renamed if name not in self.skipped]
        self.parts = {name: self._parts_of(name) for name in layers}
        self.prefixes = {name: "+".join(part.key for part in parts) for name, parts in self.parts.items()}
        self.slots = [slot for name in layers for slot in self._packed_slots(name)] + self._dense_slots()
        keys = [slot.key for slot in self.slots]
        assert len(keys) == len(set(keys)), "two tensors of one name"

    def _matrices(self) -> dict[str, Matrix]:
        """What every layer is in the dense model."""
        known = self.checkpoint.matrices
        for name, spec in self.layers.items():
            if name not in known or not self.checkpoint.keys_for(known[name].parameter):
                raise ValueError(f"{name}: the checkpoint's model has no such layer")
            if known[name].shape != spec.shape:
                raise ValueError(
                    f"{name}: the packed weight is {list(spec.shape)}, the checkpoint's model has {known[name].shape}"
                )
        return {name: known[name] for name in self.layers}

    def _refuse(self, model: nn.Module) -> None:
        """ValueError for what the format cannot hold beyond grids: kinds of layers, and layers together."""
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHED

        checkpoint, exporter = self.checkpoint, self.exporter
        dense = sorted(set(checkpoint.converted()) - self.packed)
        # Modules that transformers builds another way when it reads a quantized folder, and then finds no tensors for (Llama 4).
        dense += [name for name, module in model.named_modules() if type(module).__name__ in PATCHED]
        if dense and not exporter.dense_experts:
            raise ValueError(
                f"{exporter.name} cannot hold this model: transformers does not read dense experts ({dense[0]}, ...) "
                "beside packed layers of that format; set export.format: native"
            )
        refused: dict[str, list[str]] = {}  # reason -> layers
        for name, matrix in self.matrices.items():
            parts, keys = checkpoint.parts(name), checkpoint.keys_for(matrix.parameter)
            if reason := exporter.reject_matrix(matrix, self.layers[name].grid, parts):
                refused.setdefault(reason, []).append(name)
            elif matrix.plain and parts is None and (exporter.checkpoint_names or not self.users[keys[0]].keys() <= self.packed):
                raise ValueError(
                    f"{name}: its weight is not one tensor of the checkpoint ({len(keys)} make it), so it cannot be exchanged "
                    f"for a packed one; leave it dense: quant.exclude: [{name}]"
                )
        if self.experts and (reason := exporter.reject_experts(self.layers)):
            refused[reason] = ["these layers together"]
        if refused:
            lines = [f"{', '.join(names[:4])}{f' and {len(names) - 4} more' * (len(names) > 4)}: {why}" for why, names in refused.items()]
            raise ValueError(f"{exporter.name} cannot hold this model:\n  " + "\n  ".join(lines))

    def _parts_of(self, name: str) -> list[Part]:
        """Names of the layer in the files, and the rows of its matrix under each."""
        parts, users = self.checkpoint.parts(name), self.users[self.checkpoint.keys_for(self.matrices[name].parameter)[0]]
        tied = self.matrices[name].expert is None and len(users) > 1
        self.untied |= tied  # one of the two is packed, or each on its own: from here on they are two
        if parts is None or tied or not self.exporter.checkpoint_names:
            return [Part(name, 0, self.layers[name].shape[0])]
        return [Part(key.removesuffix(".weight"), *rows) for key, *rows in parts]

    def _packed_slots(self, name: str) -> list[_Slot]:
        spec, expert, trained = self.layers[name], self.matrices[name].expert is not None, self.checkpoint.dtype
        slots = []
        for part in self.parts[name]:
            own = replace(spec, shape=(part.last - part.first, spec.shape[1]))
            for local, (shape, dtype) in self.exporter.specs(own).items():
                dtype = self.exporter.stored_dtype(local, dtype, expert, trained)
                slots.append(_Slot(f"{part.key}.{local}", shape, dtype, name, local, part))
        return slots

    def _dense_slots(self) -> list[_Slot]:
        """Everything that is not packed, copied. Of a tied pair of which one is packed, the rest goes by the name of the other."""
        checkpoint, slots = self.checkpoint, []
        for key in checkpoint.names():
            users = self.users.get(key, {}).keys()
            left = users - self.packed
            if users and not left:
                continue
            name = next(iter(left)) if len(users) > len(left) == 1 else key
            slots.append(_Slot(name, checkpoint.shape(key), checkpoint.stored_dtype(key), None, key))
        return slots

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The checkpoint's config.json, with our quantization_config and the dtype of training."""
        config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # names Python files that are not copied
        # Readers on transformers 4 know the older key only; whichever the checkpoint used is kept.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(checkpoint.dtype).removeprefix(
            "torch."
        )
        if self.untied:
            config["tie_word_embeddings"] = False
        entry = self.exporter.model_config(self.layers, self.skipped)
        entry = self.exporter.reader_config(entry, checkpoint.config.model_type, self.experts)
        config[self.exporter.config_key] = entry
        config["quantization_config"] = {"quant_method": self.exporter.quant_method} | entry
        return config


def _dense_layers(model: nn.Module, packed: set[str]) -> list[str]:
    """Modules with a matrix that stays dense: what a reader must not expect to be packed. Stacks of experts, whose members other
    readers see as layers of their own, are named by a pattern too."""
    skipped = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        ranks = {p.dim() for key, p in module.named_parameters(recurse=False) if f"{name}.{key}" not in packed and not key.endswith("bias")}
        if ranks & {2, 3}:
            skipped.append(name)
        if 3 in ranks:
            escaped = name.replace(".", r"\.")
            skipped.append(rf"re:{escaped}\..*")
    return skipped


class _SafetensorsFiles:
    """The container of most formats: model.safetensors, or numbered shards with their index. `nbytes` is what it needs on the disk;
    `write` makes it and returns the digests of every layer."""

    def __init__(self, layout: _Layout, checkpoint: Checkpoint, exporter: Exporter, max_shard_bytes: int):
        self.shards = _shards(layout.slots, max_shard_bytes)
        self.metadata = {"format": "pt"} | exporter.file_metadata(layout.layers, checkpoint.dtype)
        self.checkpoint, self.exporter = checkpoint, exporter

    @property
    def nbytes(self) -> int:
        metadata = len(self.shards) * len(json.dumps(self.metadata))
        return metadata + sum(slot.nbytes + 200 for slots in self.shards.values() for slot in slots)

    def write(self, stage: Path, weights: Weights) -> dict[str, dict[str, str]]:
        digests = _write_shards(stage, self.shards, self.checkpoint, weights, self.exporter, self.metadata)
        _write_index(stage, self.shards)
        return digests


CONTAINERS = {"safetensors": _SafetensorsFiles, "gguf": GgufFile}  # by Exporter.container


def _shards(slots: list[_Slot], max_bytes: int) -> dict[str, list[_Slot]]:
    """File name -> its tensors, in model order over the files; in a file the widest dtypes first, so that each is aligned."""
    parts: list[list[_Slot]] = [[]]
    filled = 0
    for slot in slots:
        if parts[-1] and filled + slot.nbytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(slot)
        filled += slot.nbytes
    ordered = [sorted(part, key=lambda slot: (-slot.dtype.itemsize, slot.key)) for part in parts]
    if len(ordered) == 1:
        return {"model.safetensors": ordered[0]}
    return {f"model-{i:05}-of-{len(ordered):05}.safetensors": part for i, part in enumerate(ordered, 1)}


def _header(slots: list[_Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for slot in slots:
        span = [offset, offset + slot.nbytes]
        entries[slot.key] = {
            "dtype": _DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": span,
        }
        offset += slot.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shards(
    stage: Path,
    shards: Mapping[str, list[_Slot]],
    checkpoint: Checkpoint,
    weights: Weights,
    exporter: Exporter,
    metadata: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """Headers, then tensors at their places. Returns the digests of every layer."""
    places: dict[str, tuple[Path, int]] = {}
    for name, slots in shards.items():
        header, path = _header(slots, metadata), stage / name
        position = len(header)
        for slot in slots:
            places[slot.key] = (path, position)
            position += slot.nbytes
        with path.open("wb") as file:
            file.write(header)
            file.truncate(position)
    by_layer: dict[str | None, list[_Slot]] = {}
    for slot in (slot for slots in shards.values() for slot in slots):
        by_layer.setdefault(slot.layer, []).append(slot)

    def put(slot: _Slot, pieces: Iterable[Tensor]) -> None:
        path, position = places[slot.key]
        with path.open("r+b") as file:
            file.seek(position)
            written = sum(file.write(tensor_bytes(piece)) for piece in pieces)
        assert written == slot.nbytes, f"{slot}: {written} bytes"

    def put_layer(name: str) -> dict[str, str]:
        """One layer; none of it is left when the next one is asked for."""
        weight, tensors = weights[name], {}
        for slot in by_layer[name]:
            if slot.part not in tensors:
                first, last = (slot.part.first, slot.part.last) if slot.part else (0, weight.shape[0])
                whole = last - first == weight.shape[0]
                tensors = {slot.part: exporter.pack(weight if whole else weight.rows(first, last))}
            made = tensors[slot.part][slot.source]
            kept = made.to(slot.dtype)
            assert kept is made or torch.equal(kept.to(made.dtype), made), f"{slot.key}: {slot.dtype} cannot hold its values"
            assert tuple(kept.shape) == slot.shape and kept.dtype == slot.dtype, slot
            put(slot, [kept])
        return layer_digests(weight)

    digests = {name: put_layer(name) for name in weights}
    for slot in by_layer.get(None, []):
        put(slot, checkpoint.stored_pieces(slot.source))
    return digests


def _write_index(stage: Path, shards: Mapping[str, list[_Slot]]) -> None:
    if len(shards) > 1:
        total = sum(slot.nbytes for slots in shards.values() for slot in slots)
        where = {slot.key: name for name, slots in shards.items() for slot in slots}
        write_json(
            stage / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
        )
