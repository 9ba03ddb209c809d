"""write_model: a complete Hugging Face folder from a checkpoint and packed layers, with one tensor in memory
at a time.

Every shape and dtype is known from the specs, so the headers of all shards are written first and each tensor
goes straight to its final place in its file. Packed layers come from `weights`; everything else is copied
from the checkpoint in the dtype it is stored in. config.json's dtype becomes the one the model was trained
in, because that is the dtype in which what ships is what was trained.

The folder is there whole or not at all, and takes the place of another only when we wrote all of that one
(folder.py). Before that it is read back: every tensor in its file must have the hash of what was handed to
the disk, so neither a failing disk nor another program that writes there ships another model.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import is_same_file, staged_folder
from ..files.errors import FileError, writing
from ..files.manifest import MANIFEST, file_entry, sealed
from ..files.tensorfile import DTYPES
from ..grid import Weight
from ..kv_cache import KVConfig
from ..model.checkpoint import Checkpoint
from ..model.shipped import ShippedCheckpoint
from ..names import without_folders
from .base import Exporter, LayerSpec, Weights
from .chat import chat_files
from .folder import (
    check_extra,
    check_files,
    check_space,
    check_target,
    copied_files,
    layer_digests,
    read_manifest,
    replace_file,
    tensor_bytes,
    write_json,
)
from .gguf_file import GgufFile
from .layout import Layout, Slot
from .planes import as_integers, held

__all__ = [
    "CONTAINERS",
    "MAX_SHARD_BYTES",
    "check_files",
    "layer_digests",
    "read_manifest",
    "replace_file",
    "write_model",
]

MAX_SHARD_BYTES = (
    5_000_000_000  # as transformers' own save_pretrained (5GB of its docs; file systems and the hub like it)
)

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_model(
    folder: str | Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, Weight],
    exporter: Exporter,
    *,
    kv_cache: KVConfig | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    before_it_counts: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Write `folder` and return its manifest (the content of lowbit_ft.json).

    weights: layer name in the model -> weight; a `Weights` is read one layer at a time. kv_cache: what keys
    and values are on, for formats that say it (others leave it to the server's flag). extra_files: name ->
    content of further files (README.md, recipe.yaml). before_it_counts: called when all is written, before it
    takes its place; what it raises leaves `folder` as it was. Raises ValueError before anything is written
    when the format cannot hold a layer, a layer is not one of the checkpoint's, the disk is too small, or the
    folder exists and is not wholly ours; FileError when the disk refuses, or does not hold what was written.
    """
    folder, stream = Path(folder), as_integers(Weights.of(weights), exporter)
    check_target(folder)
    extra = check_extra(extra_files or {})
    layout = check_model(checkpoint, stream.specs, exporter)
    files = CONTAINERS[exporter.container](layout, checkpoint, exporter, max_shard_bytes)
    chat = chat_files(checkpoint.folder, checkpoint.chat_template)
    copied = [path for path in copied_files(checkpoint.folder) if path.name not in chat]
    made = {name: content for name, content in chat.items() if content is not None}
    if clash := sorted(({path.name for path in copied} | made.keys()) & set(extra)):
        raise ValueError(
            f"extra file {clash[0]!r}: the checkpoint has a file of this name, which is part of the model"
        )
    size = files.nbytes + sum(len(c) for c in (*extra.values(), *made.values()))
    size += sum(path.stat().st_size for path in copied) + (1 << 20)
    check_space(folder, size)

    with writing(folder), staged_folder(folder) as stage:
        digests = files.write(stage, stream)
        config = layout.config(checkpoint)
        if kv_cache is not None and exporter.carries_kv_cache:
            config["quantization_config"]["kv_cache"] = kv_cache.to_json()
        write_json(stage / "config.json", config)
        for path in copied:
            shutil.copyfile(path, stage / path.name)
        for name, content in {**made, **extra}.items():
            (stage / name).write_bytes(content)
        manifest = {
            "writer": "lowbit_ft",
            "version": 1,
            "format": exporter.name,
            "source": {"path": _source(checkpoint.source), "revision": checkpoint.revision},
            "files": {path.name: file_entry(path) for path in sorted(stage.iterdir())},
            "layers": {
                name: {"grid": str(spec), "stored_as": layout.prefixes[name], "sha256": digests[name]}
                for name, spec in stream.specs.items()
            },
        }
        if isinstance(checkpoint, ShippedCheckpoint):
            manifest["trained"] = trained_facts(checkpoint, layout)
        (stage / MANIFEST).write_bytes(sealed(manifest))
        if before_it_counts is not None:
            before_it_counts()
    return manifest


def _source(given: str) -> str:
    """What the model was made of, for everybody who gets the folder: of a path of this machine the name,
    which is no hub id with its "./"."""
    name = without_folders(given)
    return name if name == given else f"./{name}"


def check_model(checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter) -> Layout:
    """Where everything will lie in the files. ValueError when the format cannot hold these layers of this
    checkpoint: worth asking before they are trained."""
    if not layers:
        raise ValueError(f"{checkpoint.source}: there is no packed layer to write")
    layers = {name: replace(spec, grid=held(exporter, spec.grid)) for name, spec in layers.items()}
    if reason := exporter.missing(exporter.writes_with):
        raise ValueError(f"{exporter.name} {reason}")
    problems = exporter.reject_model(layers) + exporter.reject_checkpoint(
        checkpoint.config.to_dict(), checkpoint.folder
    )
    if checkpoint.online_layers and exporter.no_online is not None:
        problems.append(
            f"{checkpoint.online_layers[0]}: a Hadamard stays before it at inference "
            f"(quant.rotation.sites.r4), and {exporter.name} {exporter.no_online}; set r4: false, or "
            "export.format: native"
        )
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    by_dtype = {spec.grid: name for name, spec in layers.items()}
    problems += [
        f"{name}: {reason}"
        for grid, name in by_dtype.items()
        if (reason := exporter.reject_dtype(grid, dtype))
    ]
    if problems:
        raise ValueError(f"{exporter.name} cannot hold this model:\n  " + "\n  ".join(problems))
    return Layout(checkpoint, layers, exporter)


def trained_facts(checkpoint: ShippedCheckpoint, layout: Layout) -> dict[str, dict[str, str]]:
    """Of every dense tensor that was trained: its name in the files, and the sha256 of its bytes as it ships
    (formats may keep them in another order, or wider)."""
    stored = {slot.source: slot.key for slot in layout.slots if slot.layer is None}
    return {
        name: {
            "stored_as": stored[checkpoint.keys_for(name)[0]],
            "sha256": hashlib.sha256(tensor_bytes(trained.value())).hexdigest(),
        }
        for name, trained in checkpoint.trained.items()
    }


class _SafetensorsFiles:
    """The container of most formats: model.safetensors, or numbered shards with their index. `nbytes` is what
    it needs on the disk; `write` makes it and returns the digests of every layer."""

    def __init__(self, layout: Layout, checkpoint: Checkpoint, exporter: Exporter, max_shard_bytes: int):
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


def _shards(slots: list[Slot], max_bytes: int) -> dict[str, list[Slot]]:
    """File name -> its tensors, in model order over the files; in a file the widest dtypes first, so that
    each is aligned.
    """
    parts: list[list[Slot]] = [[]]
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


def _header(slots: list[Slot], metadata: Mapping[str, str]) -> bytes:
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
    shards: Mapping[str, list[Slot]],
    checkpoint: Checkpoint,
    weights: Weights,
    exporter: Exporter,
    metadata: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """Headers, then tensors at their places, then all of it read back. Returns the digests of every layer."""
    by_layer: dict[str | None, list[Slot]] = {}
    for slot in (slot for slots in shards.values() for slot in slots):
        by_layer.setdefault(slot.layer, []).append(slot)
    with ExitStack() as stack:
        files = [stack.enter_context(_Shard(stage / name, slots, metadata)) for name, slots in shards.items()]
        put = {slot.key: shard.put for shard in files for slot in shard.slots}

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
                assert kept is made or torch.equal(kept.to(made.dtype), made), (
                    f"{slot.key}: {slot.dtype} cannot hold its values"
                )
                assert tuple(kept.shape) == slot.shape and kept.dtype == slot.dtype, slot
                put[slot.key](slot, [kept])
            return layer_digests(weight)

        digests = {name: put_layer(name) for name in weights}
        for slot in by_layer.get(None, []):
            put[slot.key](slot, checkpoint.stored_pieces(slot.source))
        for shard in files:
            shard.read_back()
    return digests


class _Shard:
    """One safetensors file while it is written: opened once, so that it stays this file whatever happens to
    its name, with the hash of every tensor that was put into it.
    """

    def __init__(self, path: Path, slots: list[Slot], metadata: Mapping[str, str]):
        self.path, self.slots = path, slots
        self.places: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        header = _header(slots, metadata)
        position = len(header)
        for slot in slots:
            self.places[slot.key] = position
            position += slot.nbytes
        self.file = path.open("w+b")
        self.file.write(header)
        self.file.truncate(position)

    def __enter__(self) -> "_Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def put(self, slot: Slot, pieces: Iterable[Tensor]) -> None:
        sha, written = hashlib.sha256(), 0
        self.file.seek(self.places[slot.key])
        for piece in pieces:
            data = tensor_bytes(piece)
            written += self.file.write(data)
            sha.update(data)
        assert written == slot.nbytes, f"{slot}: {written} bytes"
        self.digests[slot.key] = sha.hexdigest()

    def read_back(self) -> None:
        """FileError naming the layer when the file does not hold what was put into it."""
        self.file.flush()
        self.file.seek(self.places[self.slots[0].key] if self.slots else 0)
        for slot in self.slots:
            sha, left = hashlib.sha256(), slot.nbytes
            while left and (data := self.file.read(min(left, 1 << 22))):
                sha.update(data)
                left -= len(data)
            if sha.hexdigest() != self.digests[slot.key]:
                raise FileError(
                    f"{self.path}: {slot.key} is not what was written a moment ago: another program writes "
                    "to this file, or the disk fails; nothing was replaced. Run the line again"
                )
        if not is_same_file(self.file.fileno(), self.path):
            raise FileError(
                f"{self.path}: was replaced by another program while it was written; nothing was replaced. "
                "Run the line again"
            )


def _write_index(stage: Path, shards: Mapping[str, list[Slot]]) -> None:
    if len(shards) > 1:
        total = sum(slot.nbytes for slots in shards.values() for slot in slots)
        where = {slot.key: name for name, slots in shards.items() for slot in slots}
        write_json(
            stage / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
        )
