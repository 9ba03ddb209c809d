"""write_model: a complete Hugging Face folder from a checkpoint and packed layers, with one tensor in memory at a time.

Every shape and dtype is known from the specs, so the headers of all shards are written first and each tensor goes straight to
its final place in its file. Packed layers come from `weights`; everything else is copied from the checkpoint in the dtype it is
stored in. config.json's dtype becomes the one the model was trained in, because that is the dtype in which what ships is what
was trained.

The folder is there whole or not at all, and takes the place of another only when we wrote all of that one (folder.py).
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import file_entry, staged_folder
from ..grid import Weight
from ..load import Checkpoint
from ..tensorfile import DTYPES
from .base import Exporter, LayerSpec, Weights
from .folder import (
    MANIFEST,
    check_extra,
    check_files,
    check_space,
    check_target,
    copied_files,
    read_manifest,
    replace_file,
    write_json,
)

__all__ = ["MAX_SHARD_BYTES", "check_files", "layer_digests", "read_manifest", "replace_file", "write_model"]

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
    folder, stream = Path(folder), Weights.of(weights)
    check_target(folder)
    extra = check_extra(extra_files or {})
    layout = check_model(checkpoint, stream.specs, exporter)
    shards = _shards(layout.slots, max_shard_bytes)
    copied = copied_files(checkpoint.folder)
    if clash := sorted({path.name for path in copied} & set(extra)):
        raise ValueError(f"extra file {clash[0]!r}: the checkpoint has a file of this name, which is part of the model")
    size = sum(slot.nbytes + 200 for slot in layout.slots) + sum(len(c) for c in extra.values())
    size += sum(path.stat().st_size for path in copied) + (1 << 20)
    check_space(folder, size)

    with staged_folder(folder) as stage:
        digests = _write_shards(stage, shards, checkpoint, stream, exporter)
        _write_index(stage, shards)
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


def layer_digests(weight: Weight) -> dict[str, str]:
    """sha256 of the bytes of every tensor of the weight, by name."""
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in weight.to_tensors().items()}


def check_model(checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter) -> "_Layout":
    """Where everything will lie in the files. ValueError when the format cannot hold these layers of this checkpoint: worth asking
    before they are trained."""
    if not layers:
        raise ValueError(f"{checkpoint.source}: there is no packed layer to write")
    problems = exporter.reject_model(layers)
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    by_dtype = {spec.grid: name for name, spec in layers.items()}
    problems += [f"{name}: {reason}" for grid, name in by_dtype.items() if (reason := exporter.reject_dtype(grid, dtype))]
    if problems:
        raise ValueError(f"{exporter.name} cannot hold this model:\n  " + "\n  ".join(problems))
    return _Layout(checkpoint, layers, exporter)


class _Layout:
    """Which tensors the output has, under which names, and what config.json says about them."""

    def __init__(self, checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter):
        model = checkpoint.empty_model("eager")
        self.layers, self.exporter = layers, exporter
        self.skipped = _dense_layers(model, layers)
        self.untied = False
        self.prefixes: dict[str, str] = {}  # layer -> the name it has in the files
        users: dict[str, set[str]] = {}  # checkpoint tensor -> the model's parameters it feeds
        for name in model.state_dict():
            for key in checkpoint.keys_for(name):
                users.setdefault(key, set()).add(name)
        fused = checkpoint.converted()
        if fused and not exporter.dense_experts:
            raise ValueError(
                f"{exporter.name} cannot hold this model: transformers does not read dense experts ({fused[0]}, ...) "
                "beside packed layers of that format; set export.format: native"
            )
        replaced, self.slots = set(), []
        for name, spec in layers.items():
            own, expected = f"{name}.weight", _shape_of(model, name)
            if expected != spec.shape:
                raise ValueError(
                    f"{name}: the packed weight is {list(spec.shape)}, the checkpoint's model has {expected}"
                )
            keys = checkpoint.keys_for(own)
            if len(keys) != 1 or not keys[0].endswith(".weight"):
                raise ValueError(
                    f"{name}: its weight is not one tensor of the checkpoint ({len(keys)} make it), so it cannot be exchanged "
                    f"for a packed one; leave it dense: quant.exclude: [{name}]"
                )
            prefix = keys[0].removesuffix(".weight") if exporter.checkpoint_names else name
            if users[keys[0]] == {own}:
                replaced.add(keys[0])
            else:  # tied to a layer that stays dense (the embedding): from here on they are two tensors
                prefix, self.untied = name, True
            self.prefixes[name] = prefix
            self.slots += [
                _Slot(f"{prefix}.{local}", shape, dtype, name, local)
                for local, (shape, dtype) in exporter.specs(spec).items()
            ]
        taken = {slot.key for slot in self.slots}
        for key in checkpoint.names():
            if key in replaced:
                continue
            assert key not in taken, key
            self.slots.append(_Slot(key, checkpoint.shape(key), checkpoint.stored_dtype(key), None, key))

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
        config["quantization_config"] = self.exporter.model_config(self.layers, self.skipped)
        return config


def _shape_of(model: nn.Module, layer: str) -> tuple[int, ...]:
    try:
        return tuple(model.get_parameter(f"{layer}.weight").shape)
    except AttributeError:
        raise ValueError(f"{layer}: the checkpoint's model has no such layer") from None


def _dense_layers(model: nn.Module, layers: Mapping[str, LayerSpec]) -> list[str]:
    """Modules with a matrix that stays dense: what a reader must not expect to be packed. Stacks of experts, whose members other
    readers see as layers of their own, are named by a pattern too."""
    skipped = []
    for name, module in model.named_modules():
        if name in layers or isinstance(module, nn.Embedding):
            continue
        ranks = {p.dim() for p in module.parameters(recurse=False)}
        if ranks & {2, 3}:
            skipped.append(name)
        if 3 in ranks:
            escaped = name.replace(".", r"\.")
            skipped.append(rf"re:{escaped}\..*")
    return skipped


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


def _header(slots: list[_Slot]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
) -> dict[str, dict[str, str]]:
    """Headers, then tensors at their places. Returns the digests of every layer."""
    places: dict[str, tuple[Path, int]] = {}
    for name, slots in shards.items():
        header, path = _header(slots), stage / name
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

    def put(slot: _Slot, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == slot.shape and tensor.dtype == slot.dtype, slot
        path, position = places[slot.key]
        with path.open("r+b") as file:
            file.seek(position)
            file.write(_bytes(tensor))

    digests = {}
    for name, weight in weights.items():
        tensors = exporter.pack(weight)
        for slot in by_layer[name]:
            put(slot, tensors[slot.source])
        digests[name] = layer_digests(weight)
    for slot in by_layer.get(None, []):
        put(slot, checkpoint.read(slot.source))
    return digests


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]  (an array is a buffer)


def _write_index(stage: Path, shards: Mapping[str, list[_Slot]]) -> None:
    if len(shards) > 1:
        total = sum(slot.nbytes for slots in shards.values() for slot in slots)
        where = {slot.key: name for name, slots in shards.items() for slot in slots}
        write_json(
            stage / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
        )
